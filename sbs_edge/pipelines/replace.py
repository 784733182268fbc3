"""Train again with further rows, and let the new bundle replace the one in use only if it is not worse."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.labels import fit_labels
from sbs_edge.data.targets import Mode, label_for
from sbs_edge.errors import DataError, UsageError
from sbs_edge.pipelines.compare import compare_bundles
from sbs_edge.runtime.hub import copy_bundle
from sbs_edge.runtime.manifest import read_manifest

__all__ = ["add_rows", "check_served", "judge_replacement", "next_version", "refusal", "replace_bundle"]


def add_rows(splits: Splits, rows: Sequence[Example], mode: Mode) -> tuple[Splits, dict[str, int]]:
    """Add rows to the training split, so that validation and test stay as they were.

    Args:
        splits: of the earlier training; they are not changed.
        rows: annotated rows.
        mode: how the student learns, which decides what label a row needs.

    Returns:
        the splits, and counts: ``rows`` given, ``added``, ``held_out`` (their input is a validation or test input),
        ``repeated`` (a training row has the same input and label) and ``unlabelled`` (no label for this mode).

    Raises:
        DataError: no row can be added.

    """
    held = {normalise(row.input) for part in (splits.validation, splits.test) for row in part}
    known = {(normalise(row.input), label_for(row, mode)) for row in splits.train}
    ids = {row.id for row in splits.train}
    counts = {"rows": len(rows), "added": 0, "held_out": 0, "repeated": 0, "unlabelled": 0}
    kept: list[Example] = []
    for row in fit_labels(rows, splits.task)[0]:
        key = (normalise(row.input), label_for(row, mode))
        if key[1] is None:
            counts["unlabelled"] += 1
        elif key[0] in held:
            counts["held_out"] += 1
        elif key in known:
            counts["repeated"] += 1
        else:
            known.add(key)
            name = row.id if row.id not in ids else f"added-{len(kept)}-{row.id}"
            ids.add(name)
            kept.append(dataclasses.replace(row, id=name))
    counts["added"] = len(kept)
    if not kept:
        raise DataError(
            f"None of the {len(rows)} rows can be added: {counts['unlabelled']} have no label that the mode {mode} "
            f"learns, {counts['repeated']} repeat training rows, and {counts['held_out']} are validation or test rows. "
            "Annotate the recorded rows first; the modes distill and stepwise-teacher learn the teacher's labels."
        )
    return dataclasses.replace(splits, train=[*splits.train, *kept]), counts


def check_served(path: Path) -> None:
    """Raise :class:`UsageError` unless there is a bundle at ``path`` that a new one can be compared with."""
    if not (path / "manifest.json").is_file():
        raise UsageError(
            f"There is no bundle at {path} to compare the new one with. Pass served='BUNDLE', or train without added "
            "rows first."
        )
    read_manifest(path)


def next_version(version: str) -> str:
    """Return the version after ``version``.

    Example:
        >>> next_version("3"), next_version("2026-11")
        ('4', '2026-11.1')

    """
    return str(int(version) + 1) if version.isdecimal() else f"{version}.1"


def judge_replacement(
    served: Path, candidate: Path, rows: Sequence[Example], max_loss: float
) -> dict[str, Any]:
    """Compare the new bundle with the one in use on the same test rows.

    It is accepted if it loses at most ``max_loss`` points, and the 95 % interval of the difference reaches zero.

    Returns:
        the comparison (:func:`~sbs_edge.pipelines.compare.compare_bundles`) with ``max_loss`` and ``accepted``.

    """
    found = compare_bundles(served, candidate, rows)
    gain = found["gain"]
    accepted = gain is not None and gain["points"] >= -max_loss and gain["high"] >= 0
    return {**found, "max_loss": max_loss, "accepted": accepted}


def replace_bundle(served: Path, candidate: Path) -> None:
    """Put the new bundle in the place of the one in use, in one step, and remove its other copy."""
    copy_bundle(candidate, served)
    shutil.rmtree(candidate)


def refusal(found: dict[str, Any], served: Path, candidate: Path) -> str:
    """Return why the new bundle does not replace the one in use, with the numbers."""
    gain = found["gain"]
    if gain is None:
        return f"No test row has a label to judge by. {served} was kept; the new bundle is {candidate}."
    first, second = (100 * bundle["accuracy"] for bundle in found["bundles"])
    return (
        f"The new bundle answers {second:.2f} % of {gain['n']} test rows rightly and the one in use {first:.2f} %: "
        f"{gain['points']:+.2f} points (95 % interval {gain['low']:+.2f} to {gain['high']:+.2f}). At most "
        f"{found['max_loss']:.2f} points may be lost, and the interval must reach zero. {served} was kept; the new bundle "
        f"is {candidate}. Read the added rows, or raise --max-drop if this loss is acceptable."
    )
