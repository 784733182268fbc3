"""Samples of one case, and their conversion to rows, ratios and reasons of the document."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sbs_edge.bench.core.results import Row
from sbs_edge.bench.core.rounds import Series, fixed_ratio, shared_ratio
from sbs_edge.bench.core.stats import percentiles
from sbs_edge.bench.kernels.cases import Case
from sbs_edge.bench.kernels.peers import FLOOR, OURS

__all__ = ["SECTIONS", "CaseRecord", "Entry", "state"]

SECTIONS = {
    "forward": "forward",
    "step": "forward + backward",
    "graph": "forward + backward, CUDA graph",
}
ROOF = "slice products"
# Below this a memory figure is the allocator's grain, not the method's need.
_LEAST_MIB = 1.0


@dataclass(frozen=True, slots=True)
class Entry:
    """A peer and the batch it is given."""

    peer: str
    variant: str

    @property
    def name(self) -> str:
        """Name for messages and tables."""
        return f"{self.peer}, {self.variant}" if self.variant else self.peer


@dataclass(slots=True)
class CaseRecord:
    """The measurements of one case.

    Attributes:
        case: the case.
        device: ``cpu`` or ``cuda``.
        facts: what the worker said about the case: plain torch's error, the engine ``auto`` takes.
        failures: why an entry was not measured.
        wrong: why an entry's result fails the tolerance; it is measured but gets no ratio.
        memory_failures: why an entry has times but no memory.
        graph_failures: why an entry has times but none of a captured step.
        roofs: the slice products' rates, one a round.
    """

    case: Case
    device: str
    facts: dict[str, Any] = field(default_factory=dict)
    failures: dict[Entry, str] = field(default_factory=dict)
    wrong: dict[Entry, str] = field(default_factory=dict)
    memory_failures: dict[Entry, str] = field(default_factory=dict)
    graph_failures: dict[Entry, str] = field(default_factory=dict)
    first_ms: dict[Entry, float] = field(default_factory=dict)
    errors: dict[Entry, dict[str, float]] = field(default_factory=dict)
    times: dict[tuple[Entry, str], Series] = field(default_factory=dict)
    host: dict[tuple[Entry, str], float] = field(default_factory=dict)
    memory: dict[Entry, dict[str, float]] = field(default_factory=dict)
    roofs: list[dict[str, Any]] = field(default_factory=list)
    roof_failure: str = ""

    def fail(self, entry: Entry, why: str) -> None:
        """Keep the reason why ``entry`` has no figures; those it had are dropped."""
        self.failures[entry] = why
        for what in SECTIONS:
            self.times.pop((entry, what), None)

    def series(self, entry: Entry, what: str) -> Series:
        """The samples of one entry, ``what`` being a key of :data:`SECTIONS`."""
        return self.times.setdefault((entry, what), Series())

    @property
    def roof_tflops(self) -> float | None:
        """Median rate of the three slice products over the rounds."""
        return statistics.median(item["tflops"] for item in self.roofs) if self.roofs else None

    def _row(
        self, entry: Entry, section: str, unit: str, value: float, rounds: Sequence[float] = (), **extra: Any
    ) -> Row:
        better: Literal["lower", "higher"] = "higher" if unit in ("%", "TFLOP/s") else "lower"
        return Row(
            section, entry.peer, entry.variant, self.case.name, unit, better, value, list(rounds), extra
        )

    def _time_rows(self) -> list[Row]:
        rows = []
        roof = self.roof_tflops
        for (entry, what), series in self.times.items():
            if not series.rounds:
                continue
            row = series.row(SECTIONS[what], entry.peer, entry.variant, self.case.name)
            row.extra = {
                **percentiles(series.samples, (20, 50, 80)),
                "n": len(series.samples),
                "host_ms": self.host.get((entry, what)),
                "first_ms": self.first_ms.get(entry),
            }
            rows.append(row)
            if what == "step" and roof:
                share, *shares = (
                    100.0 * self.case.flops / (ms * 1e-3) / (roof * 1e12)
                    for ms in (row.value, *series.rounds)
                )
                rows.append(self._row(entry, "share of roof", "%", share, shares))
        return rows

    def rows(self) -> list[Row]:
        """Every figure of the case."""
        rows = self._time_rows()
        if self.roofs:
            rates = [item["tflops"] for item in self.roofs]
            each = {
                key: statistics.median(item["each"][key] for item in self.roofs)
                for key in self.roofs[0]["each"]
            }
            shape = {key: self.roofs[0][key] for key in ("n", "d", "width", "dtype")}
            value = statistics.median(rates)
            rows.append(self._row(Entry(ROOF, ""), "roof", "TFLOP/s", value, rates, **shape, each=each))
        for entry, found in self.memory.items():
            for what, section in (("step", "extra memory"), ("forward", "extra memory, forward")):
                reserved = found.get(f"{what}_reserved")
                rows.append(self._row(entry, section, "MiB", found[what], reserved_mib=reserved))
        for entry, errors in self.errors.items():
            plain = self.facts["plain"]["gradient"]
            extra = {
                **{key: value for key, value in errors.items() if math.isfinite(value)},
                "times_plain": _finite(errors["gradient"] / plain) if plain else None,
                "wrong": self.wrong.get(entry),
            }
            for section, key, more in (("gradient error", "gradient", extra), ("loss error", "loss", {})):
                if math.isfinite(errors[key]):
                    rows.append(self._row(entry, section, "relative", errors[key], (), **more))
        return rows

    def _withheld(self, ours: Entry, peer: Entry) -> str | None:
        if ours in self.wrong:
            return f"{ours.peer} fails the tolerance: {self.wrong[ours]}"
        if peer in self.wrong:
            return f"{peer.peer} fails the tolerance: {self.wrong[peer]}"
        return None

    def ratios(self) -> list[dict[str, Any]]:
        """Return the ratios of this project's engines to every other loss with the same batch."""
        found = []
        for ours in dict.fromkeys(entry for entry, _ in self.times if entry.peer.startswith(OURS)):
            for peer in dict.fromkeys(entry for entry, _ in self.times):
                if peer == ours or peer.variant != ours.variant:
                    continue
                why = self._withheld(ours, peer)
                for section, ratio in self._sections(ours, peer):
                    found.append(
                        {
                            "section": section,
                            "case": self.case.name,
                            "variant": ours.variant,
                            "ours": ours.peer,
                            "peer": peer.peer,
                            "peer_variant": peer.variant,
                            "ratio": None if why else ratio,
                            "withheld": why,
                        }
                    )
        return found

    def _sections(self, ours: Entry, peer: Entry) -> list[tuple[str, dict[str, Any] | None]]:
        found: list[tuple[str, dict[str, Any] | None]] = []
        for what, section in SECTIONS.items():
            top, bottom = (self.times.get((entry, what), Series()).rounds for entry in (peer, ours))
            ratio = shared_ratio(top, bottom)
            if what != "graph" or ratio:  # captured only in the cases that ask for it
                found.append((section, ratio))
        if peer.peer != FLOOR and ours in self.memory and peer in self.memory:
            mine, theirs = (max(self.memory[entry]["step"], _LEAST_MIB) for entry in (ours, peer))
            found.append(("extra memory", fixed_ratio(theirs / mine)))
        return found

    def write(self, document: dict[str, Any]) -> None:
        """Add the case to ``document``."""
        document["cases"].append(
            {
                **self.case.as_dict(),
                "name": self.case.name,
                "shape": self.case.shape,
                "device": self.device,
                "facts": self.facts,
                "roof_failure": self.roof_failure,
            }
        )
        document["rows"] += [row.as_dict() for row in self.rows()]
        document["ratios"] += self.ratios()
        for status, reasons in (
            ("failed", self.failures), ("no speed-up", self.wrong), ("memory failed", self.memory_failures),
            ("no CUDA graph", self.graph_failures),
        ):  # fmt: skip
            document["systems"] += [
                state(entry.peer, self.case.name, entry.variant, status, why)
                for entry, why in reasons.items()
            ]


def state(name: str, case: str, variant: str, status: str, why: str) -> dict[str, str]:
    """Return the document's record of a loss without figures or without a ratio."""
    return {"name": name, "case": case, "variant": variant, "status": status, "why": why}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
