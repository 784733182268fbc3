"""Small students and few rows, so that a real run takes seconds."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.example import Splits

SMALL = {
    "d_model": 16, "d_ff": 32, "n_heads": 2, "n_layers": 1, "n_decoder_layers": 1, "batch_size": 8,
    "eval_steps": 4, "trackers": (), "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def splits() -> Splits:
    """The built-in task, cut down."""
    full = builtin_splits("ci", teacher_error=0.25)
    return Splits(full.task, full.train[:64], full.validation[:20], full.test[:20])


@pytest.fixture
def small() -> dict[str, Any]:
    """Options of a run of a few seconds."""
    return dict(SMALL)
