"""Tell the rows that a student believes from those it does not, by the losses of their rationales alone.

A teacher that misreads an input argues for its wrong label, so its rationale contradicts what the student has
learnt from the other rows. Before the student learns such rows by heart, their losses stand apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["doubtful"]

LEAST_ROWS = 50
"""Fewer rows say nothing about two groups."""

MOST_SHARE = 0.5
"""If more rows than this share stand apart, they are not taken for wrong."""


def doubtful(losses: Tensor) -> Tensor:
    """Return which rows stand apart by high losses; none where the losses are one group.

    The logarithms are cut where the two sides have the least variance within (Otsu's method). A normal distribution
    cut so loses ``2 / pi`` of its variance; the cut counts only where it takes clearly more than that, by a margin
    that a normal sample of the same size exceeds once in about a thousand times.

    Args:
        losses: (N,) mean token losses of the rows' rationales, before they are learnt by heart.

    Returns:
        (N,) bool.

    Example:
        >>> spread = torch.linspace(0.9, 1.1, 60)
        >>> doubtful(torch.cat([0.1 * spread, 0.8 * spread[:20]])).sum()
        tensor(20)

    """
    none = torch.zeros(len(losses), dtype=torch.bool)
    if len(losses) < LEAST_ROWS:
        return none
    logs = losses.double().clamp(min=1e-9).log()
    ordered = logs.sort().values
    count, sums, squares = len(logs), ordered.cumsum(0), ordered.square().cumsum(0)
    below = torch.arange(1, count)
    total = squares[-1] - sums[-1] ** 2 / count
    lower = squares[:-1] - sums[:-1] ** 2 / below
    upper = (squares[-1] - squares[:-1]) - (sums[-1] - sums[:-1]) ** 2 / (count - below)
    place = int((lower + upper).argmin())
    explained = 1.0 - float((lower + upper)[place] / total) if total > 0 else 0.0
    apart = logs > ordered[place]
    if not explained > 2.0 / math.pi + 1.0 / math.sqrt(count) or apart.sum() > MOST_SHARE * count:
        return none
    return apart
