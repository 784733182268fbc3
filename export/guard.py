"""What a lossy step costs, measured on rows, and the refusal when it costs too much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbs_edge.errors import GuardError

__all__ = ["check_pruning", "compare_labels", "refusal", "token_agreement", "too_much"]

RESAMPLES = 2000


def compare_labels(
    reference: Sequence[str], got: Sequence[str], right_before: Sequence[bool], right_after: Sequence[bool]
) -> dict[str, Any]:
    """Return accuracies, their difference in points with a paired-bootstrap bound, and agreement.

    ``drop_bound`` is the 95th percentile of the drop over resampled rows: the drop on new rows of
    this kind is below it with 95 % confidence.
    """
    n = len(reference)
    before, after = np.asarray(right_before, float), np.asarray(right_after, float)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, n, (RESAMPLES, n))
    drops = 100.0 * (before[picks] - after[picks]).mean(axis=1)
    return {
        "n": n,
        "before": float(before.mean()),
        "after": float(after.mean()),
        "drop_points": float(100.0 * (before.mean() - after.mean())),
        "drop_bound": float(np.quantile(drops, 0.95)),
        "label_agreement": float(np.mean([a == b for a, b in zip(reference, got, strict=True)])),
    }


def token_agreement(reference: Sequence[Sequence[str]], got: Sequence[Sequence[str]]) -> float:
    """Return the share of positions with the same word, over the longer of each pair of texts."""
    same = total = 0
    for first, second in zip(reference, got, strict=True):
        same += sum(a == b for a, b in zip(first, second, strict=False))
        total += max(len(first), len(second))
    return same / total if total else 1.0


def too_much(figures: dict[str, Any], max_drop: float) -> bool:
    """Tell whether the drop is over ``max_drop`` points."""
    return bool(figures["drop_points"] > max_drop)


def refusal(
    target: str,
    figures: dict[str, Any],
    max_drop: float,
    layers: Sequence[tuple[str, float]] = (),
    pruned: Sequence[str] = (),
) -> GuardError:
    """Return the error for a target that lost too much.

    Args:
        target: its name.
        figures: what :func:`compare_labels` returned.
        max_drop: the limit, in points.
        layers: the layers that cost most, each with its share of the error.
        pruned: the flags given that make the vocabulary smaller.
    """
    advice = "more calibration rows (--calibration-rows), the target cpu-fp32"
    if layers:
        named = ", ".join(f"{layer} ({100 * share:.0f} % of the error)" for layer, share in layers)
        flags = " ".join(f"--keep-float {layer}" for layer, _ in layers)
        advice = f"to keep the layers that cost most in float32 ({named}): {flags}; {advice}"
    if pruned:
        advice = f"without {' and '.join(pruned)}, {advice}"
    return GuardError(
        f"{target} answers {figures['drop_points']:.2f} points fewer rows right than the float32 student "
        f"({100 * figures['before']:.2f} % to {100 * figures['after']:.2f} %, {figures['n']} rows, 95 % bound "
        f"{figures['drop_bound']:.2f} points, same label on {100 * figures['label_agreement']:.2f} %); the limit is "
        f"{max_drop:.2f}. Nothing was replaced. Try, of the options of 'sbs-edge export', {advice}, or raise "
        "--max-drop if this loss is acceptable."
    )


def check_pruning(
    target: str, figures: dict[str, Any], max_drop: float, flags: Sequence[str] = ("--prune-vocabulary",)
) -> None:
    """Raise :class:`GuardError` when fewer tokens to write changed more than ``max_drop`` % of the rationales' words."""
    changed = 100.0 * (1.0 - figures.get("rationale_token_agreement", 1.0))
    if changed > max_drop:
        raise GuardError(
            f"With the pruned vocabulary {target} writes {changed:.2f} % of the rationales' words differently "
            f"({figures['n_rationales']} rows); the limit is {max_drop:.2f}. Nothing was replaced. Export without "
            f"{' and '.join(flags)}, or raise --max-drop if this loss is acceptable."
        )
