"""The student directory, which training writes, and export and evaluation read. Imports no torch.

``config.json``, ``model.safetensors``, ``generation_config.json`` and ``tokenizer.json`` as transformers
writes them, ``sbs_edge.json`` (task, prefixes, limits, how it was trained), ``validation.jsonl`` and
``calibration.jsonl`` (training examples for calibration).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.readers import RejectedRow, stream_examples
from sbs_edge.data.tokenizer import load_tokenizer
from sbs_edge.errors import DataError, UsageError
from sbs_edge.tokens import TextTokenizer
from sbs_edge.training.checkpoint import CARD, Checkpoint, open_checkpoint
from sbs_edge.windows import LongSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["CALIBRATION", "CARD", "FORMAT", "VALIDATION", "MadeFiles", "StudentDir"]

FORMAT = 1
VALIDATION = "validation.jsonl"
CALIBRATION = "calibration.jsonl"


class MadeFiles:
    """A temporary directory for small files of a student, deleted with the object."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sbs-edge-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class StudentDir:
    """An opened student directory.

    Attributes:
        path: the directory.
        task: the task it was trained for.
        prefixes: ``label`` and ``rationale``.
        limits: ``max_source_tokens``, ``max_target_tokens``, ``max_label_tokens``.
        mode: the training mode.
        card: everything in ``sbs_edge.json``.
        checkpoint: place of weights and configuration, for a checkpoint that was not trained here.
        made: directory of small files made for such a checkpoint, such as its fast tokenizer.
    """

    path: Path
    task: TaskSpec
    prefixes: Mapping[str, str]
    limits: Mapping[str, int]
    mode: str
    card: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    made: MadeFiles | None = None

    @property
    def long(self) -> LongSettings | None:
        """The settings with which inputs over ``max_source_tokens`` are read; None: they are cut or refused."""
        return LongSettings.of(self.card.get("long"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StudentDir:
        """Open the directory ``path``.

        Raises:
            UsageError: it is not a student directory.
            DataError: its card is damaged or of a later format.
        """
        root = open_checkpoint(str(path)).folder
        card_path = root / CARD
        if not card_path.is_file():
            raise UsageError(
                f"{root} has no {CARD}, so its task and prefixes are unknown. Train with sbs-edge train, or "
                "pass the labels when you export it."
            )
        try:
            card = json.loads(card_path.read_text(encoding="utf-8"))
            if card["format"] > FORMAT:
                raise DataError(
                    f"{card_path} has format {card['format']}; this version reads up to {FORMAT}."
                )
            task = card["task"]
            return cls(
                root,
                TaskSpec(task["name"], task["label_kind"], tuple(task["labels"]), task["compare"]),
                card["prefixes"],
                {
                    name: int(card[name])
                    for name in ("max_source_tokens", "max_target_tokens", "max_label_tokens")
                },
                card["mode"],
                card,
            )
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{card_path} is damaged ({type(error).__name__}: {error}); train again."
            ) from error

    @staticmethod
    def task_card(task: TaskSpec) -> dict[str, Any]:
        """Return the task in the form of the card."""
        return {**asdict(task), "labels": list(task.labels)}

    def tokenizer(self) -> Tokenizer:
        """Load the fast tokenizer."""
        return load_tokenizer(self.companion("tokenizer.json").parent)

    def companion(self, name: str) -> Path:
        """Return the path of a small file beside the weights: made for this checkpoint, or its own."""
        made = self.made.folder / name if self.made is not None else None
        return made if made is not None and made.is_file() else self.path / name

    def text_tokenizer(self) -> TextTokenizer:
        """Load the tokenizer as training and the runtime use it, without control tokens in texts."""
        return TextTokenizer(self.tokenizer())

    def _rows(self, name: str) -> list[Example]:
        path = self.path / name
        if not path.is_file() or not path.stat().st_size:
            return []
        bad: list[RejectedRow] = []
        rows = list(stream_examples(path, on_reject=bad.append))
        if bad:
            # Training wrote all of them, so the file is damaged, and the accuracy check needs every row.
            raise DataError(
                f"{bad[0]}. {len(bad)} row(s) of {path} cannot be read, although training wrote them. Correct them, or "
                "copy the student again."
            )
        return rows

    def validation(self) -> list[Example]:
        """Return the validation rows that chose the student's weights; empty if there were none.

        Raises:
            DataError: a row is damaged.
        """
        return self._rows(VALIDATION)

    def calibration(self) -> list[Example]:
        """Return the training rows stored for calibrating quantisation; empty if there are none.

        Raises:
            DataError: a row is damaged.
        """
        return self._rows(CALIBRATION)

    def load_model(self) -> Any:
        """Load the transformers model in float32, in evaluation mode (imports torch).

        Raises:
            UsageError: the weights are damaged or lack tensors.
        """
        from sbs_edge.training.pretrained import load_checkpoint, load_opened

        return load_checkpoint(str(self.path)) if self.checkpoint is None else load_opened(self.checkpoint)
