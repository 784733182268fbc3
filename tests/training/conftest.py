"""Small students and few rows, so that a real run takes seconds."""

from __future__ import annotations

from pathlib import Path
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


@pytest.fixture
def spiece(tmp_path: Path) -> Any:
    """Train a small SentencePiece model, ``spiece.model`` in the test's folder."""
    spm = pytest.importorskip("sentencepiece")
    lines = tmp_path / "lines.txt"
    lines.write_text("where is my order\nit costs 3.50 not 4\nplease cancel it\n" * 50)
    spm.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(tmp_path / "spiece"), vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
