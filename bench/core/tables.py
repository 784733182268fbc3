"""Tables of a result document, as text for Markdown, the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sbs_edge.bench.core.results import Row, rows_of

__all__ = [
    "Table",
    "headline",
    "latency_tables",
    "markdown",
    "number",
    "provenance_lines",
    "ratio_text",
    "record_table",
    "scale_tables",
    "small",
    "stream_tables",
    "train_tables",
]


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table with a note on how to read it."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def number(value: float | None) -> str:
    """Return three significant digits at most, or a dash."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def small(value: float | None) -> str:
    """Return a small number such as an error, with two digits, or a dash."""
    return "–" if value is None else f"{value:.1e}"


def record_table(title: str, note: str, records: Sequence[dict[str, Any]]) -> Table | None:
    """Return a table with a row for each record and a column for each key; None without records."""
    if not records:
        return None
    columns = list(dict.fromkeys(key for row in sorted(records, key=len, reverse=True) for key in row))

    def shown(value: Any) -> str:
        if isinstance(value, float):
            return small(value) if 0 < abs(value) < 0.01 else number(value)
        return "–" if value is None else str(value)

    return Table(title, note, columns, [[shown(row.get(key)) for key in columns] for row in records])


def markdown(table: Table, level: int = 3) -> str:
    """Return a Markdown section with the table; numbers are right-aligned."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"{'#' * level} {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    lines.append("| " + " | ".join(cell(name) for name in table.columns) + " |")
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(table.columns) - 1)) + "|")
    lines += ["| " + " | ".join(cell(item) for item in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _name(system: str, variant: str) -> str:
    return f"{system}, {variant}" if variant else system


def _grid(title: str, note: str, rows: Sequence[Row], shown: Any, first: str = "system") -> Table | None:
    """Systems down, cases across."""
    if not rows:
        return None
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys((row.system, row.variant) for row in rows))
    found = {(row.system, row.variant, row.case): row for row in rows}
    body = []
    for system, variant in names:
        cells = [found.get((system, variant, case)) for case in cases]
        body.append([_name(system, variant), *(shown(cell) if cell else "–" for cell in cells)])
    return Table(title, note, [first, *cases], body)


def _percentile_cell(row: Row) -> str:
    e = row.extra
    if not all(level in e for level in ("p50", "p90", "p99")):
        return number(row.value)
    return f"{number(e['p50'])} / {number(e['p90'])} / {number(e['p99'])}"


def _load_cell(row: Row) -> str:
    if row.extra.get("saturated"):
        return f"saturated at {number(row.extra['rate'])}/s"
    return f"{_percentile_cell(row)} at {number(row.extra['rate'])}/s"


def _systems(document: dict[str, Any]) -> Table | None:
    records = []
    for system in document["systems"]:
        quality = system.get("quality", {})
        records.append(
            {
                "system": system["name"],
                "precision": system.get("precision"),
                "label accuracy %": quality.get("label accuracy"),
                "label agreement with fp32 %": quality.get("label agreement with fp32"),
                "rationale words equal to fp32 %": quality.get("rationale agreement with fp32"),
                "state": system["why"] or "measured",
            }
        )
    note = (
        "Random weights: the right label is what the fp32 weights answer among the label set."
        if document["model"]["random_weights"]
        else f"On {document['validation_rows']} validation rows, against their gold labels."
    )
    return record_table("Systems and their answers", note, records)


def ratio_text(row: dict[str, Any]) -> str:
    """Return ``1.92x (1.85 to 1.99)``, or why there is no ratio."""
    if row["ratio"] is None:
        return f"withheld: {row['withheld']}" if row["withheld"] else "–"
    ratio = row["ratio"]
    if ratio["low"] == ratio["high"] or ratio["rounds"] < 2:
        return f"{ratio['value']:.2f}x"
    return f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _ratios(document: dict[str, Any]) -> list[Table | None]:
    note = (
        "How many times faster or smaller it is; below 1 the peer wins. In brackets the 95 % bootstrap "
        "interval over the interleaved rounds. A system whose answers are worse gets no ratio."
    )
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in document["ratios"]:
        case = f"{row['section'].replace('_', ' ')}: {row['case']}"
        if row["section"] == "label" and row["peer_variant"]:
            case += f", peer {row['peer_variant']}"
        records = found.setdefault(row["ours"], {})
        records.setdefault(case, {"case": case}).setdefault(row["peer"], ratio_text(row))
    return [
        record_table(f"{ours} against each peer", note, list(records.values()))
        for ours, records in found.items()
    ]


def latency_tables(document: dict[str, Any]) -> list[Table]:
    """Return every table of a latency document."""
    rows = rows_of(document)

    def of(section: str) -> list[Row]:
        return [row for row in rows if row.section == section]

    loads = of("open_loop")
    found = [
        _systems(document),
        _grid("Label, ms", "p50 / p90 / p99 of a call, text in, label out.", of("label"), _percentile_cell),
        _grid(
            "Rationale",
            "Milliseconds, p50 / p90 / p99; `a token` is the mean after the first; `rate` is tokens a second.",
            of("rationale"),
            _percentile_cell,
        ),
        _grid(
            "Throughput, requests a second",
            "A mixed-length stream, each system at its best batching setting (the sweep is in the JSON).",
            of("throughput"),
            lambda row: f"{number(row.value)} ({_setting(row.extra['setting'])})",
        ),
        _grid(
            "Latency under load, ms",
            "Poisson arrivals; p50 / p90 / p99 from arrival to answer. The common rate is half of the "
            "fastest peer's capacity.",
            loads,
            _load_cell,
        ),
        _grid(
            "Cold start, ms",
            "New process to first answer, files in the page cache.",
            of("cold_start"),
            _percentile_cell,
        ),
        _grid("Memory of that process, MB", "", of("memory"), lambda row: number(row.value)),
        _grid("On disk, MB", "", of("disk"), lambda row: number(row.value)),
        _grid(
            "Installed, MB",
            "What must be installed to run it, with everything it requires, Python itself left out.",
            of("installed"),
            lambda row: f"{number(row.value)} ({row.extra['distributions']} packages)",
        ),
    ]
    return [table for table in [*found, *_ratios(document)] if table is not None]


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in setting.items())


def train_tables(document: dict[str, Any]) -> list[Table]:
    """Return every table of a training document."""
    rows = rows_of(document)
    found: list[Table | None] = []
    for device in dict.fromkeys(row.case.partition(", ")[0] for row in rows):
        records: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row.case.partition(", ")[0] == device:
                name = f"{row.section.replace('_', ' ')}, {row.unit}"
                records.setdefault(row.system, {"step": row.system}).setdefault(name, number(row.value))
        found.append(record_table(f"Training step on {device}", "", list(records.values())))
    padding = [{"step": name, **share} for name, share in document.get("padding", {}).items()]
    ratios = [
        {"case": row["case"], "figure": row["section"], "against": row["peer"], "ratio": ratio_text(row)}
        for row in document.get("ratios", [])
    ]
    curves = [
        {
            "case": item["case"],
            "against": item["against"],
            "difference": f"{item['largest_difference']:.2e}",
            "verdict": item["verdict"],
        }
        for item in document.get("loss_curves", [])
    ]
    failed = [{"step": s["name"], "why": s["why"]} for s in document.get("systems", []) if s.get("why")]
    ratio_note = "Above 1 it is faster or smaller; 95 % bootstrap interval over interleaved rounds."
    curve_note = "Largest relative difference of the loss over all steps."
    found += [
        record_table("Padding", "Share of positions that hold no token.", padding),
        record_table("This project's step against the others", ratio_note, ratios),
        record_table("Loss curves on the same seed and data", curve_note, curves),
        record_table("Not measured", "", failed),
    ]
    return [table for table in found if table is not None]


def scale_tables(document: dict[str, Any]) -> list[Table]:
    """Return the table of an offline-scoring document."""
    variants = [
        {
            "variant": name,
            "rows a second": document["rows_per_second"][name],
            "whole call, s": seconds,
            "steady part, s": document["steady_seconds"][name],
        }
        for name, seconds in document["seconds"].items()
    ]
    note = (
        f"{document['rows']:,} rows, median of {document['rounds']} rounds. One Ray actor costs "
        f"{100 * document['steady_overhead']:.1f} % over the loop in the steady part; two actors are "
        f"{document['steady_scaling_1_to_2']:.2f} times as fast as one. "
        f"Outputs equal: {'yes' if document['outputs_equal'] else 'NO'}."
    )
    found = record_table("Offline scoring", note, variants)
    return [found] if found else []


def stream_tables(document: dict[str, Any]) -> list[Table]:
    """Return the table of a streaming document."""
    record = {
        "rows": f"{document['rows']:,}",
        "peak memory, MiB": document["peak_rss_mb"],
        "limit, MiB": document["max_rss_mb"],
        "slope, MiB a million rows": document["slope_after_first_tenth_mb_per_million_rows"],
        "rows a second": document["rows_per_second"],
    }
    found = record_table("Memory of streamed training", "Slope after the first tenth of the rows.", [record])
    return [found] if found else []


def headline(document: dict[str, Any]) -> str:
    """Return one line: the model, the machine and the date."""
    machine = document["machine"]
    where = machine["gpus"][0].split(",")[0] if machine.get("gpus") else machine["cpu"]
    model = document["model"]
    what = model.get("shape") or model.get("task") or model.get("student")
    weights = " (random weights)" if model.get("random_weights") else ""
    return f"{what}{weights}, {where}, {document['created'][:10]}"


def _command(document: dict[str, Any]) -> str:
    """Return the command that repeats a result; older serving results were started as a module."""
    command = " ".join(document["command"])
    module, scenario, rest = command.partition(" all ")
    if module != "python -m sbs_edge.bench.serving":
        return command
    return "sbs-edge bench serving" + scenario + rest.removesuffix(".json")


def provenance_lines(document: dict[str, Any]) -> list[str]:
    """Return the machine, versions, seed and command behind the figures."""
    machine = document["machine"]
    load = " / ".join(str(item) for item in machine["load_average"])
    lines = [
        f"machine: {machine['cpu']} (family {machine['cpu_family']}, model {machine['cpu_model']}), "
        f"{machine['cpus']} processors, {machine['memory_gb']} GB, kernel {machine['kernel']}",
        f"flags: {', '.join(machine['flags']) or 'none of those that matter'}; "
        f"absent: {', '.join(machine['flags_absent']) or 'none'}",
        f"threads: {document.get('threads')}; processors used: {document.get('cpus')}; "
        f"load average at start: {load}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        f"seed: {document.get('seed')}; command: {_command(document)}",
    ]
    if machine.get("gpus"):
        state = machine.get("gpu_state") or []
        asked = " (SM clock, its maximum, memory clock, power, its limit, temperature, state at start)"
        lines.insert(1, "GPU: " + "; ".join([*machine["gpus"], *state]) + (asked if state else ""))
    return lines
