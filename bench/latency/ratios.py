"""Ratios of this project's bundle to each peer, with their spread, or why none is given."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sbs_edge.bench.core.results import Row
from sbs_edge.bench.core.rounds import fixed_ratio, shared_ratio
from sbs_edge.bench.latency.quality import rationale_withheld, withheld
from sbs_edge.bench.latency.sections import COMMON_RATE
from sbs_edge.bench.latency.workers import Benchmark, Entry

__all__ = ["RatioRow", "ratios"]

_SECTIONS = ("label", "rationale", "throughput", "open_loop", "cold_start", "memory", "disk", "installed")
_TIMED = ("label", "rationale", "throughput", "open_loop", "cold_start")


@dataclass(frozen=True, slots=True)
class RatioRow:
    """Ratio of ``ours`` to ``peer`` in a case: above 1 ours is better, below 1 the peer.

    ``withheld`` says why ``ratio`` is None although both were measured.
    """

    section: str
    case: str
    ours: str
    peer: str
    peer_variant: str
    ratio: dict[str, Any] | None
    withheld: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form for JSON."""
        return asdict(self)


def _matches(ours: Row, peer: Row) -> bool:
    """Return whether two rows of a section measure the same task."""
    if ours.section != peer.section or ours.case != peer.case:
        return False
    if ours.section == "open_loop" and ours.case != COMMON_RATE:
        return False  # a share of one's own capacity is another load for every system
    if ours.section in ("rationale", "memory"):
        return ours.variant == peer.variant
    return True  # label: one answer against label + EOS and one token; disk: label alone and all


def _other_length(ours: Row, peer: Row) -> str | None:
    """Whole rationales of different lengths are different work."""
    mine, others = sum(ours.extra["new_tokens"]), sum(peer.extra["new_tokens"])
    if ours.variant != "whole" or abs(mine - others) <= 0.1 * others:
        return None
    return f"{mine} new tokens against {others}"


def _ratio(ours: Row, peer: Row) -> dict[str, Any] | None:
    if ours.value <= 0 or peer.value <= 0:
        return None
    top, bottom = (peer, ours) if ours.better == "lower" else (ours, peer)
    if min([*top.rounds, *bottom.rounds], default=1.0) <= 0:
        return None  # a difference of two times that noise has turned around
    return shared_ratio(top.rounds, bottom.rounds) or fixed_ratio(top.value / bottom.value)


def ratios(benchmark: Benchmark, rows: list[Row]) -> list[RatioRow]:
    """Compare every row of ours with the peers' rows of the same case."""
    entries: dict[str, Entry] = {entry.name: entry for entry in benchmark.entries}
    found = []
    for row in rows:
        ours = entries.get(row.system)
        if ours is None or not ours.ours or row.section not in _SECTIONS:
            continue
        for other in rows:
            peer = entries.get(other.system)
            if peer is None or peer.ours or not _matches(row, other):
                continue
            if ours.golds is not None and peer.golds is None:
                continue  # the full depth beside a shallower peer says nothing about either
            why = None
            if row.section in _TIMED:
                why = withheld(ours, peer, benchmark.inputs.random_weights)
            if why is None and row.section == "rationale":
                why = rationale_withheld(ours, peer) or _other_length(row, other)
            if why is None and (row.extra.get("saturated") or other.extra.get("saturated")):
                why = "a queue that only grows has no latency"
            ratio = None if why else _ratio(row, other)
            case = (
                f"{row.variant}, {row.case}" if row.section in ("rationale", "disk", "memory") else row.case
            )
            found.append(
                RatioRow(
                    row.section,
                    case,
                    row.system,
                    other.system,
                    other.variant,
                    ratio,
                    why,
                )
            )
    return found
