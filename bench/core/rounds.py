"""Interleaved rounds: who comes first in a round, the samples of a measured point, and the ratio of two points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from sbs_edge.bench.core.results import Row
from sbs_edge.bench.core.stats import paired_ratio, percentiles

__all__ = ["Series", "fixed_ratio", "median_row", "rotated", "shared_ratio"]

_SLOW_CALL_S = 0.3
Item = TypeVar("Item")


def rotated(items: Sequence[Item], number: int) -> list[Item]:
    """Return the items beginning with the next one each round: A B C, then B C A, ..."""
    at = number % len(items) if items else 0
    return [*items[at:], *items[:at]]


@dataclass(slots=True)
class Series:
    """Samples of a measured point: all of them, and the median of each round."""

    samples: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    def add(self, ns: list[int], scale: float = 1e-6) -> None:
        """Add one round's samples, scaled (to ms by default)."""
        values = [value * scale for value in ns]
        self.samples += values
        self.rounds.append(percentiles(values, (50,))["p50"])

    @property
    def warm(self) -> int:
        """Uncounted calls before the next round: none once calls are slow and have been made before."""
        return 0 if self.rounds and self.rounds[-1] > _SLOW_CALL_S * 1e3 else 1

    def row(self, section: str, system: str, variant: str, case: str, **extra: Any) -> Row:
        """The row of this series in ms: the median, with percentiles over all samples."""
        found = percentiles(self.samples)
        more = {**found, "n": len(self.samples), **extra}
        return Row(section, system, variant, case, "ms", "lower", found["p50"], list(self.rounds), more)


def median_row(
    section: str, system: str, variant: str, case: str, unit: str, rounds: list[float], **extra: Any
) -> Row:
    """The row of a figure known once a round: rates are better when higher, all else when lower."""
    better: Literal["lower", "higher"] = "higher" if unit.endswith("/s") else "lower"
    return Row(section, system, variant, case, unit, better, percentiles(rounds)["p50"], rounds, extra)


def shared_ratio(top: Sequence[float], bottom: Sequence[float]) -> dict[str, Any] | None:
    """Return the ratio of two points over the rounds that both have, for the document; None without a round."""
    shared = min(len(top), len(bottom))
    return asdict(paired_ratio(top[:shared], bottom[:shared])) if shared else None


def fixed_ratio(value: float) -> dict[str, Any]:
    """Return the ratio of two figures that were measured once, for the document."""
    return {"value": value, "low": value, "high": value, "rounds": 0}
