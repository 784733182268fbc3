"""The typed arguments of ``train`` agree with what checks them."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest

from sbs_edge import TrainConfig, UsageError, train
from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.load import load_splits
from sbs_edge.training.options import DataOptions, TrainOptions


def test_the_options_are_the_fields_of_the_configuration() -> None:
    fields = get_type_hints(TrainConfig)
    assert get_type_hints(TrainOptions) == {name: fields[name] for name in TrainConfig.model_fields}


def test_the_data_options_are_the_parameters_of_load_splits() -> None:
    parameters = get_type_hints(load_splits)
    wanted = list(inspect.signature(load_splits).parameters)[1:]  # without the source
    assert get_type_hints(DataOptions) == {name: parameters[name] for name in wanted}


def test_train_without_data_names_the_built_in_task(tmp_path) -> None:
    with pytest.raises(UsageError, match='"builtin"'):
        train(out=tmp_path / "student")
    with pytest.raises(ValueError, match="leave them out if you pass splits"):
        train(builtin_splits("default"), tmp_path / "student", data_options={"seed": 1})
    with pytest.raises(UsageError, match="no_such is not a field"):
        train("builtin", tmp_path / "student", no_such=1)  # type: ignore[call-arg]
    assert not (tmp_path / "student").exists()
