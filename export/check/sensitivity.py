"""Find the layers to keep in float32 by measuring each one, after a target failed the accuracy check."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sbs_edge.data.example import Example
from sbs_edge.export.assemble import GraphInputs, write_target
from sbs_edge.export.quant.mixed import layers_of
from sbs_edge.export.targets import Target

__all__ = ["most_sensitive"]

ROWS = 128
NAMED = 3


def most_sensitive(
    target: Target,
    recipe: GraphInputs,
    rows: Sequence[Example],
    open_student: Callable[[Path, dict[str, Any]], Any],
    distance: Callable[[Any, Sequence[Example]], float],
) -> list[tuple[str, float]]:
    """Return (layer, share of the target's error it causes), the largest first.

    A layer's share is the part of the distance between the target's answers and the float32 student's that
    disappears when only this layer is kept in float32.

    Args:
        target: the refused target.
        recipe: the inputs of its graphs.
        rows: rows to measure on; at most 128 are used.
        open_student: opens a student from a folder and a target's entry.
        distance: returns the distance of a student's answers from the float32 student's on some rows.
    """
    measured = list(rows[:ROWS])

    def error(keep: Sequence[str]) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            tried = dataclasses.replace(recipe, keep_float=tuple({*recipe.keep_float, *keep}))
            entry = write_target(Path(scratch) / target.name, target, tried)
            with open_student(Path(scratch), entry) as student:
                return distance(student, measured)

    whole = error(())
    if whole <= 0:
        return []
    shares = [
        (layer, (whole - error([layer])) / whole)
        for layer in layers_of(recipe.weights)
        if layer not in recipe.keep_float
    ]
    return sorted((pair for pair in shares if pair[1] > 0), key=lambda pair: -pair[1])[:NAMED]
