"""Settings for long inputs at export, and the targets and layouts that refuse them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sbs_edge.errors import UsageError
from sbs_edge.export.targets import Target
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.windows import LongSettings

__all__ = ["MAX_LONG_TOKENS", "check_long", "long_settings"]

MAX_LONG_TOKENS = 65536
"""Longest input of a bundle, where nothing else is asked for."""

_LEARNT = ("chunk", "overlap", "header", "marker")
_CHOSEN = (*_LEARNT, "top_k", "max_tokens")  # not "trained": only training can say that


def long_settings(opened: StudentDir, wanted: bool | Mapping[str, Any] | None) -> LongSettings | None:
    """Return how long inputs are read, or None: not at all.

    Args:
        opened: the student.
        wanted: fields of :class:`LongSettings` that differ from the student's own or from the defaults; True for no
            difference, False for no long inputs, and None for what the student was trained with.

    Raises:
        UsageError: a field is unknown or cannot be used, or contradicts what the student has learnt.
    """
    if wanted is False or (wanted is None and opened.long is None):
        return None
    most = opened.limits["max_source_tokens"]
    fields = dict(wanted) if isinstance(wanted, Mapping) else {}
    unknown = sorted(set(fields) - set(_CHOSEN))
    if unknown:
        raise UsageError(f"long has no field {unknown[0]!r}; the fields are {', '.join(_CHOSEN)}.")
    learnt = opened.long
    if learnt is not None and (taught := [name for name in _LEARNT if name in fields]):
        raise UsageError(
            f"{opened.path} was trained on long inputs and says itself how they are cut; leave {taught[0]} out."
        )
    base = learnt or LongSettings(chunk=most, max_tokens=most)
    chosen = LongSettings(
        **{**base.describe(), "max_tokens": max(base.max_tokens, MAX_LONG_TOKENS), **fields}
    )
    if chosen.chunk > most:
        raise UsageError(
            f"A chunk of {chosen.chunk} tokens is longer than the {most} tokens that the student reads in one piece; "
            "make the chunks smaller."
        )
    return chosen


def check_long(targets: Iterable[Target], layout: str, single_file: bool) -> None:
    """Raise :class:`UsageError` for targets and layouts that cannot read inputs in chunks."""
    for target in targets:
        if target.steps:
            raise UsageError(
                f"Long inputs are read in chunks on CPU targets only, and {target.name} is not one; leave it out, or "
                "export without long inputs (long=False)."
            )
    if layout != "bundle" or single_file:
        what = "A single file" if single_file else f"The {layout} layout"
        raise UsageError(
            f"{what} cannot hold the graphs that read long inputs in chunks; export without long inputs (long=False)."
        )
