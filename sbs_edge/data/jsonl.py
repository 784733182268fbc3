"""Examples as JSON Lines, the format that the stages exchange."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sbs_edge import files
from sbs_edge.data.example import Example

__all__ = ["example_to_json", "write_examples"]


def example_to_json(example: Example) -> dict[str, Any]:
    """Return the row's fields, without unknown and default values."""
    row = {name: value for name, value in asdict(example).items() if value not in (None, "", ())}
    if example.teacher_probs:
        row["teacher_probs"] = {label: round(share, 6) for label, share in example.teacher_probs}
    if example.confidence == 1.0:
        del row["confidence"]
    row.setdefault("input", example.input)
    return row


def write_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write one JSON object per line, in one step; :func:`sbs_edge.data.readers.read_examples` reads it back."""
    lines = (json.dumps(example_to_json(example), ensure_ascii=False) for example in examples)
    files.write_text(path, "".join(line + "\n" for line in lines))
