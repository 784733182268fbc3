"""A refusal inside a block that catches ValueError keeps its own words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbs_edge import DataError, UsageError
from sbs_edge.training.pretrained import load_checkpoint
from sbs_edge.training.student_dir import CARD, FORMAT, StudentDir


def test_a_student_of_a_later_format_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(json.dumps({"format": FORMAT + 1}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(DataError) as refused:
        StudentDir.load(tmp_path)
    assert str(refused.value).endswith(f"has format {FORMAT + 1}; this version reads up to {FORMAT}.")
    assert "damaged" not in str(refused.value)


def test_a_checkpoint_of_another_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UsageError) as refused:
        load_checkpoint(str(tmp_path), None)
    assert str(refused.value).startswith(f"{tmp_path} is a 'bert' model")
