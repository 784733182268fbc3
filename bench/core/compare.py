"""Compare two results of the same benchmark: find figures that changed by more than their noise.

Rows are matched by section, system, variant and case. The change of a row is the ratio of the two
figures, inverted where higher is better, so that above 1 is worse. Its interval is a bootstrap over the
rounds of both runs. A row has become worse when the change exceeds the tolerance *and* the whole interval lies above 1.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sbs_edge.bench.core.results import Row, rows_of
from sbs_edge.bench.core.stats import unpaired_ratio
from sbs_edge.errors import DataError

__all__ = ["Change", "compare", "conditions"]

Verdict = Literal["worse", "better", "within noise", "within tolerance"]


@dataclass(frozen=True, slots=True)
class Change:
    """A row of both results.

    ``change`` is above 1 when B is worse; ``low`` and ``high`` bound it (equal where a side has no rounds).
    """

    section: str
    system: str
    variant: str
    case: str
    unit: str
    before: float
    after: float
    change: float
    low: float
    high: float
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form for JSON."""
        return asdict(self)


def _change(before: Row, after: Row, tolerance: float) -> Change | None:
    if before.value <= 0 or after.value <= 0:
        return None
    worse_is_more = before.better == "lower"
    old = before.rounds or [before.value]
    new = after.rounds or [after.value]
    top, bottom = (new, old) if worse_is_more else (old, new)
    ratio = unpaired_ratio(top, bottom)
    if ratio.value > 1 + tolerance:
        verdict: Verdict = "worse" if ratio.low > 1 else "within noise"
    elif ratio.value < 1 / (1 + tolerance):
        verdict = "better" if ratio.high < 1 else "within noise"
    else:
        verdict = "within tolerance"
    return Change(
        before.section, before.system, before.variant, before.case, before.unit,
        before.value, after.value, ratio.value, ratio.low, ratio.high, verdict,
    )  # fmt: skip


def compare(
    first: dict[str, Any], second: dict[str, Any], tolerance: float = 0.15, only: str | None = None
) -> list[Change]:
    """Compare result B with result A.

    Args:
        first: the older document.
        second: the newer one.
        tolerance: share by which a figure may become worse (0.15 is the noise of an ordinary idle machine).
        only: keep systems whose name starts with this.

    Raises:
        DataError: the documents are of different benches or share no row.
    """
    if first.get("kind") != second.get("kind"):
        raise DataError(
            f"One result is of 'bench {first.get('kind')}', the other of 'bench {second.get('kind')}': "
            "compare two results of the same bench."
        )
    old = {row.key: row for row in rows_of(first)}
    found = []
    for row in rows_of(second):
        if row.key in old and (only is None or row.system.startswith(only)):
            change = _change(old[row.key], row, tolerance)
            if change is not None:
                found.append(change)
    if not found:
        raise DataError("The two results have no measured row in common: nothing can be compared.")
    return found


def conditions(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return differences between the two runs that may explain a change: machine, threads, versions, weights."""
    found = []
    for field in ("cpu", "cpus", "flags", "gpus"):
        old, new = (document["machine"].get(field) for document in (first, second))
        if old != new:
            found.append(f"machine.{field}: {old} -> {new}")
    if first.get("threads") != second.get("threads"):
        found.append(f"threads: {first.get('threads')} -> {second.get('threads')}")
    names = sorted({*first["versions"], *second["versions"]})
    for name in names:
        old, new = first["versions"].get(name), second["versions"].get(name)
        if old != new:
            found.append(f"{name}: {old} -> {new}")
    weights = [document.get("model", {}).get("weights_sha256") for document in (first, second)]
    if weights[0] != weights[1]:
        found.append("the weights differ")
    return found
