"""Tables of a kernel result, one a case; and those of a whole session on a GPU."""

from __future__ import annotations

from typing import Any

from sbs_edge.bench.core.results import Row, rows_of
from sbs_edge.bench.core.tables import Table, number, ratio_text, record_table, small, train_tables
from sbs_edge.bench.kernels.case import SECTIONS
from sbs_edge.bench.kernels.peers import OURS, PEERS

__all__ = ["kernel_tables"]

_NOTE = (
    "Medians over interleaved rounds, in brackets the 20th and 80th percentile. Extra MiB: peak beyond inputs and "
    "gradients, of a forward pass without gradients and of forward + backward. Errors: relative, against float64 on "
    "the same rounded inputs, rel-L2 for dX and dW; then how many times plain torch's error in the same precision "
    "the larger of the two is. Roof: 6NDV over the time, as a share of the rate of the three bare products of one "
    "slice on this device. Last: how many times faster that engine is in forward + backward, with the 95 % bootstrap "
    "interval; below 1 it is slower. A loss that is off by more than twice plain torch's error gets no ratio."
)


def _spread(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{number(row.value)} ({number(row.extra['p20'])} to {number(row.extra['p80'])})"


def _three(values: list[float | None]) -> str:
    return " / ".join(small(value) for value in values) if any(v is not None for v in values) else "–"


def _case_table(document: dict[str, Any], case: dict[str, Any], rows: list[Row]) -> Table:
    name = case["name"]
    found = {(row.section, row.system, row.variant): row for row in rows if row.case == name}
    ratios = {
        (item["ours"], item["peer"], item["variant"]): item
        for item in document["ratios"]
        if item["case"] == name and item["section"] == "forward + backward"
    }
    engines = list(dict.fromkeys(ours for ours, _, _ in ratios))
    order = {peer: index for index, peer in enumerate(PEERS)}
    names = sorted(
        {(system, variant) for section, system, variant in found if section != "roof"},
        key=lambda item: (item[1] == "compacted", order.get(item[0], len(order)), item),
    )
    graphs = any(section == SECTIONS["graph"] for section, _, _ in found)
    body = []
    for system, variant in names:
        mine = {section: row for (section, *who), row in found.items() if who == [system, variant]}
        errors = mine["gradient error"].extra if "gradient error" in mine else {}
        memory = [
            mine[key].value if key in mine else None for key in ("extra memory, forward", "extra memory")
        ]
        share, captured = mine.get("share of roof"), mine.get(SECTIONS["graph"])
        against = [ratios.get((ours, system, variant)) for ours in engines]
        body.append(
            [
                f"{system}, {variant}" if variant else system,
                _spread(mine.get("forward")),
                _spread(mine.get("forward + backward")),
                *([number(captured.value if captured else None)] if graphs else []),
                " / ".join(number(value) for value in memory),
                _three([errors.get(key) for key in ("loss", "hidden_rel_l2", "weight_rel_l2")]),
                number(errors.get("times_plain")),
                number(share.value if share else None),
                *(_ratio(hit) for hit in against),
            ]
        )
    facts, roof = case["facts"], found.get(("roof", "slice products", ""))
    told = []
    if roof is not None:
        each = ", ".join(f"{key} {number(rate)}" for key, rate in roof.extra["each"].items())
        told.append(
            f"Slice products ({roof.extra['width']} classes a slice): {number(roof.value)} TFLOP/s ({each})."
        )
    if facts.get("auto"):
        told.append(f"The engine 'auto' is {facts['auto'].removeprefix(OURS)}.")
    if facts.get("loss_scale", 1.0) != 1.0:
        told.append(f"Gradients under a loss scale of {facts['loss_scale']:g}.")
    columns = [
        "loss", "forward, ms", "forward + backward, ms", *(["as a CUDA graph, ms"] if graphs else []),
        "extra MiB", "error of loss / dX / dW", "x plain",
        "roof %", *(f"{ours} is" for ours in engines),
    ]  # fmt: skip
    return Table(f"{case['device']}, {name}", " ".join(told), columns, body)


def _ratio(item: dict[str, Any] | None) -> str:
    if item is None:
        return "–"
    return "withheld" if item["withheld"] else ratio_text(item)


def _reasons(document: dict[str, Any]) -> Table | None:
    """Every loss without figures or without a ratio, once a reason."""
    cases = list(dict.fromkeys(case["name"] for case in document["cases"]))
    where: dict[tuple[str, str, str], list[str]] = {}
    for state in document["systems"]:
        places = where.setdefault((state["name"], state["status"], state["why"]), [])
        if state["case"] not in places:
            places.append(state["case"])
    records = [
        {
            "loss": name,
            "state": status,
            "case": "every case" if len(cases) > 1 and places == cases else "; ".join(places),
            "why": why,
        }
        for (name, status, why), places in where.items()
    ]
    return record_table("Without figures, or without a ratio", "", records)


def _session_tables(session: dict[str, Any]) -> list[Table]:
    found = [
        record_table(
            "Stages", "What a session on a GPU did, in order, within its time.", session.get("stages", [])
        ),
        record_table(
            "Bare matrix products, TFLOP/s",
            "The three products of one slice, before anything else ran.",
            session.get("matmul", []),
        ),
        record_table(
            "Correctness on the device",
            "Against float64; the bound is twice plain torch's error in the same precision.",
            session.get("correctness", []),
        ),
        record_table("Workspace and tile sweep", "Forward + backward.", session.get("sweep", [])),
        record_table("Bundle targets on the device", "", session.get("targets", [])),
    ]
    tables = [table for table in found if table is not None]
    if session.get("train"):
        tables += train_tables(session["train"])
    return tables


def kernel_tables(document: dict[str, Any]) -> list[Table]:
    """Every table of a kernel document."""
    rows = rows_of(document)
    found = [_case_table(document, case, rows) for case in document["cases"]]
    if found:
        first = found[0]
        found[0] = Table(first.title, f"{_NOTE} {first.note}".strip(), first.columns, first.rows)
    reasons = _reasons(document)
    return [*found, *([reasons] if reasons else []), *_session_tables(document.get("session", {}))]
