"""Choices as the paper's cqa has them, named twice in 146 rows or longer than any trained on, are answered."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.export.api import export
from sbs_edge.training.evaluate import evaluate
from sbs_edge.training.train import train

Run = Callable[..., subprocess.CompletedProcess[str]]


def _rows(split: str, count: int) -> list[Example]:
    return [
        Example(f"{split}-{i}", f"where does the {split} bus {i} stop", "bridge", "bridge", "a bus stops there",
                ("beach", "bridge", "bridge"))
        for i in range(count)
    ]  # fmt: skip


def test_a_choice_named_twice_is_one_answer(tmp_path: Path, sbs_edge_cli: Run) -> None:
    splits = Splits(
        TaskSpec("stops", "choices"), _rows("train", 24), _rows("validation", 6), _rows("test", 6)
    )
    student = train(splits, tmp_path / "student", max_steps=3, batch_size=8, d_model=16, d_ff=32).student_dir
    assert evaluate(student, splits.test)["n"] == 6
    result = export(student, tmp_path / "bundle", targets=("cpu-fp32",))
    assert result.manifest["targets"]["cpu-fp32"]["accuracy"]["n"] == 6
    row = {
        "id": "a",
        "input": "where does the bus stop",
        "choices": ["beach", "bridge", "bridge", "a bridge " * 9],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    done = sbs_edge_cli("predict", tmp_path / "bundle", tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["probabilities"]) == {"beach", "bridge", "a bridge " * 9}
