"""The accuracy check: compare a lossy target with float32 on rows, and refuse it above the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbs_edge.errors import GuardError

__all__ = [
    "compare_labels",
    "compare_rationales",
    "drifted",
    "pruning_refusal",
    "rationale_refusal",
    "refusal",
    "too_much",
]

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


def compare_rationales(reference: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return two agreements of decoded token lists, each in [0, 1].

    ``rationale_token_agreement`` is the share of positions with the same token, over the longer of each
    pair. A different token shifts all later ones, so a good rationale may score low.

    ``rationale_next_token_agreement`` is how often the same token follows the same beginning: the number of equal
    tokens before the first difference, divided by that number plus the difference. It distinguishes a student that
    continues differently at some point from one that is broken, whatever the length. The accuracy check limits it.
    """
    same = places = followed = asked = 0
    for first, second in zip(reference, got, strict=True):
        equal = [a == b for a, b in zip(first, second, strict=False)]
        same, places = same + sum(equal), places + max(len(first), len(second))
        begin = next((at for at, alike in enumerate(equal) if not alike), len(equal))
        followed, asked = followed + begin, asked + begin + (list(first) != list(second))
    return {
        "n_rationales": len(reference),
        "rationale_token_agreement": same / places if places else 1.0,
        "rationale_next_token_agreement": followed / asked if asked else 1.0,
    }


def drifted(figures: dict[str, Any], least: float) -> bool:
    """Return whether rationales have the reference's next token less often than ``least``."""
    return bool(figures.get("rationale_next_token_agreement", 1.0) < least)


def too_much(figures: dict[str, Any], max_drop: float) -> bool:
    """Return whether the drop is over ``max_drop`` points."""
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
        figures: the result of :func:`compare_labels`.
        max_drop: the limit, in points.
        layers: the layers that cost most, each with its share of the error.
        pruned: the given options that make the vocabulary smaller.
    """
    advice = _advice(layers, target)
    if pruned:
        advice = f"leaving out {' and '.join(pruned)}; {advice}"
    return GuardError(
        f"{target} loses {figures['drop_points']:.2f} points of label accuracy against the float32 student "
        f"({100 * figures['before']:.2f} % to {100 * figures['after']:.2f} %, {figures['n']} rows, 95 % bound "
        f"{figures['drop_bound']:.2f} points, same label on {100 * figures['label_agreement']:.2f} %); the limit is "
        f"{max_drop:.2f}. Nothing was replaced. These options of export can help: {advice}. Or raise max_drop if "
        "this loss is acceptable."
    )


def rationale_refusal(
    target: str, figures: dict[str, Any], least: float, layers: Sequence[tuple[str, float]] = ()
) -> GuardError:
    """Return the error for a target whose rationales differ too often; arguments as for :func:`refusal`."""
    followed, same = figures["rationale_next_token_agreement"], figures["rationale_token_agreement"]
    return GuardError(
        f"{target} writes the float32 student's next token in {100 * followed:.2f} % of the steps of its "
        f"rationales ({figures['n_rationales']} rows, {100 * same:.2f} % of all tokens equal); the limit is "
        f"{100 * least:.2f} %. Nothing was replaced. These options of export can help: {_advice(layers, target)}; "
        "label_only=True, if nobody reads rationales. Or lower min_rationale_agreement if such rationales are "
        "acceptable."
    )


def _advice(layers: Sequence[tuple[str, float]], target: str) -> str:
    finer = "cpu-int8 or cpu-fp32" if target.endswith("int4") else "cpu-fp32"
    advice = f"more calibration_rows; the target {finer}"
    if not layers:
        return advice
    shares = ", ".join(f"{layer} {100 * share:.0f} %" for layer, share in layers)
    return (
        f"keep_float={[layer for layer, _ in layers]}, the layers with most of the error ({shares}); {advice}"
    )


def pruning_refusal(figures: dict[str, Any], max_drop: float, options: Sequence[str]) -> GuardError | None:
    """Return the error if a smaller vocabulary alone, in float32, costs more than ``max_drop``, else None.

    The cost is in points of label accuracy, and in per cent of the rationales' tokens that changed.
    """
    changed = 100.0 * (1.0 - figures.get("rationale_token_agreement", 1.0))
    if too_much(figures, max_drop):
        cost = (
            f"loses {figures['drop_points']:.2f} points of label accuracy ({100 * figures['before']:.2f} % to "
            f"{100 * figures['after']:.2f} %, {figures['n']} rows)"
        )
    elif changed > max_drop:
        cost = (
            f"writes {changed:.2f} % of the rationales' tokens differently ({figures['n_rationales']} rows)"
        )
    else:
        return None
    return GuardError(
        f"With the pruned vocabulary the float32 student {cost}; the limit is {max_drop:.2f}. Nothing was replaced. "
        f"Export without {' and '.join(options)}, or raise max_drop if this loss is acceptable."
    )
