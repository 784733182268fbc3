"""Student directories to export: random tiny ones, and one that was trained on an easy task."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

_SPEC = spec_from_file_location("tiny_students", Path(__file__).parents[2] / "runtime" / "conftest.py")
_TINY: Any = module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _TINY
_SPEC.loader.exec_module(_TINY)

LABELS = ("stay", "go", "wait")


def easy_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose label follows from one word in them."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label, sign = rng.choice([("stay", "hot"), ("go", "cold"), ("wait", "ice")])
        words = [*rng.choices(["pump", "valve", "room", "fan", "filter", "door"], k=rng.randint(2, 8)), sign]
        rng.shuffle(words)
        rows.append(
            {
                "id": str(number),
                "input": " ".join(words),
                "label": label,
                "rationale": f"the {sign} room so {label}",
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_student(
    folder: Path, tiny: Any, rows: int = 60, labels: tuple[str, ...] = LABELS, kind: str = "closed"
) -> Path:
    """Write what training writes."""
    tiny.model.save_pretrained(str(folder))
    tiny.tokenizer.save(str(folder / "tokenizer.json"))
    write_rows(folder / "validation.jsonl", easy_rows(rows, seed=1))
    write_rows(folder / "calibration.jsonl", easy_rows(rows, seed=2))
    card = {
        "format": 1, "task": {"name": "easy", "label_kind": kind, "labels": list(labels), "compare": "text"},
        "prefixes": _TINY.PREFIXES, "mode": "stepwise", "rationale_weight": 1.0, "max_source_tokens": 40,
        "max_target_tokens": 16, "max_label_tokens": 4, "seed": 0, "versions": {}, "training": {},
    }  # fmt: skip
    (folder / "sbs_edge.json").write_text(json.dumps(card))
    return folder


def learn(tiny: Any, steps: int = 80) -> None:
    """Teach both tasks in a few seconds."""
    import torch

    rows = easy_rows(steps * 16, seed=3)
    optimiser = torch.optim.AdamW(tiny.model.parameters(), lr=3e-3)
    tiny.model.train()
    for step in range(steps):
        part = rows[step * 16 : step * 16 + 16]
        pairs = [(tiny.ids(row["input"]), tiny.tokenizer.encode(row["label"]).ids) for row in part] + [
            (tiny.ids(row["input"], _TINY.PREFIXES["rationale"]), tiny.tokenizer.encode(row["rationale"]).ids)
            for row in part
        ]
        source = torch.nn.utils.rnn.pad_sequence([torch.tensor(a) for a, _ in pairs], batch_first=True)
        target = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(b) for _, b in pairs], batch_first=True, padding_value=-100
        )
        loss = tiny.model(input_ids=source, attention_mask=source.ne(0).long(), labels=target).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    tiny.model.eval()


@pytest.fixture(scope="session")
def make_student() -> Callable[..., Path]:
    """``make_student(folder, seed=0, labels=..., kind=..., rows=..., **shape)`` writes a random student."""

    def make(folder: Path, seed: int = 0, labels=LABELS, kind="closed", rows=60, **shape: Any) -> Path:
        return write_student(folder, _TINY.make_tiny(seed, **shape), rows, labels, kind)

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(student directory, the model with its tokenizer) that answers the easy task. Read only."""
    tiny = _TINY.make_tiny(initializer_factor=1.0)
    learn(tiny)
    return write_student(tmp_path_factory.mktemp("trained"), tiny), tiny


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    return easy_rows
