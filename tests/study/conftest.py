"""A study of tiny students on few rows, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("onnx")

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.example import Splits
from sbs_edge.data.jsonl import write_examples
from sbs_edge.pipelines.study.config import StudyConfig

TINY = "d_model=16 d_ff=32 n_heads=2"


@pytest.fixture(scope="session")
def splits() -> Splits:
    """The built-in task, cut down."""
    full = builtin_splits("ci", teacher_error=0.25)
    return Splits(full.task, full.train[:64], full.validation[:20], full.test[:20])


@pytest.fixture(scope="session")
def rows_folder(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as files."""
    folder = tmp_path_factory.mktemp("rows")
    for name in ("train", "validation", "test"):
        write_examples(folder / f"{name}.jsonl", getattr(splits, name))
    return folder


@pytest.fixture
def config() -> Callable[..., StudyConfig]:
    """``config(**changes)``: one tiny student, both methods, two shares, one seed, three steps."""

    def make(**changes: Any) -> StudyConfig:
        given: dict[str, Any] = {
            "students": (f"one: {TINY} 1/1",), "shares": (0.5, 1.0), "seeds": 1, "steps": 3,
            "training": {"batch_size": 8},
        }  # fmt: skip
        return StudyConfig(**{**given, **changes})

    return make
