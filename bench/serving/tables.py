"""Tables of a serving document: goals, measured figures and processor time."""

from __future__ import annotations

from typing import Any

from sbs_edge.bench.core.tables import Table

__all__ = ["serving_tables"]

Row = tuple[str, str, str, str | None]  # figure, goal, measured, name of the promise in "held"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _latency(part: dict[str, Any]) -> list[Row]:
    measured = f"{part['added_p50_ms']:.2f} ms, over {part['in_process_p50_ms']:.2f} ms in process"
    return [("added p50 at low load", "at most 1 ms", measured, "added_1_ms")]


def _throughput(part: dict[str, Any]) -> list[Row]:
    measured = f"{_percent(part['ratio'])} ({part['served_texts_per_s']:.0f} texts a second)"
    return [("throughput against in-process", "at least 90 %", measured, "ratio_90_percent")]


def _drain(part: dict[str, Any]) -> list[Row]:
    n, lost = part["in_flight_at_sigterm"], part["lost"]
    return [
        (f"SIGTERM with {n} requests in flight", "none lost", f"{lost} lost", "none_lost"),
        ("readiness off", "within 100 ms", f"{part['readiness_off_ms']:.1f} ms", "readiness_100_ms"),
        ("exit", "code 0", f"code {part['exit_code']} after {part['exit_s']:.1f} s", "exit_0"),
    ]


def _overload(part: dict[str, Any]) -> list[Row]:
    cores, turns = part["cores"], part["goodput_of_peak_by_turn"]
    where = "shared processors" if cores["server"] == cores["client"] else "processors of their own"
    goodput = (
        f"{_percent(part['goodput_of_peak'])} of {part['peak_texts_per_s']:.0f} texts a second "
        f"(median of {len(turns)} turns, {_percent(min(turns))} to {_percent(max(turns))}), "
        f"with {part['rejections_per_s']:.0f} rejections a second"
    )
    rows: list[Row] = [
        ("answers", "only 200 and 429", _codes(part), "only_200_and_429"),
        ("rejection p99", "at most 20 ms", f"{part['rejection_p99_ms']:.1f} ms", "rejection_p99_20_ms"),
        ("goodput of peak", "at least 90 %", goodput, "goodput_90_percent"),
        ("growth of memory", "at most 5 %", _percent(part["rss_growth"]), "rss_growth_5_percent"),
        ("accepted p99", "unloaded p99 and 1 s of queue",
         f"{part['accepted_p99_ms']:.0f} ms (unloaded {part['calm_p99_ms']:.0f} ms)",
         "accepted_p99_within_queue_budget"),
        ("processor time", "",
         f"server {part['server_cpu_s']:.1f} s, client {part['client_cpu_s']:.1f} s, not sent for want of "
         f"a connection {part['unsent_by_client']}", None),
    ]  # fmt: skip
    if "client_late_p99_ms" in part:
        late = (
            f"{part['client_late_p99_ms']:.1f} ms after a request was due, its loop "
            f"{part['client_loop_late_p99_ms']:.1f} ms"
        )
        rows.append(("the client's own lateness, p99", "", late, None))
    name = f"4x overload, {part['seconds']:.0f} s, client and server on {where}: "
    return [(name + figure, *rest) for figure, *rest in rows]  # type: ignore[misc]  # three of them


def _codes(part: dict[str, Any]) -> str:
    return ", ".join(f"{n} x {code}" for code, n in part["codes"].items())


def _cost(part: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for key, name in (
        ("answered_1_texts", "processor time of an answered request of 1 text"),
        ("answered_16_texts", "processor time of an answered request of 16 texts"),
        ("refused", "processor time of a refused request of 16 texts"),
    ):
        each = part[key]
        rows.append((name, "", f"server {each['server_us']:.0f} us, client {each['client_us']:.0f} us", None))
    return rows


def _soak(part: dict[str, Any]) -> list[Row]:
    n, threads, files = part["requests"], part["threads"], part["descriptors"]
    name = f"soak of {n} mixed requests in {part['seconds']:.0f} s: "
    return [
        (f"{name}growth of memory", "at most 1 MiB per 10,000",
         f"{part['rss_slope_mib_per_10k']:.2f} MiB per 10,000", "rss_slope_1_mib_per_10k"),
        (f"{name}threads", "constant", f"{threads['start']} before, {threads['end']} after",
         "threads_constant"),
        (f"{name}descriptors", "constant", f"{files['start']} before, {files['end']} after",
         "descriptors_constant"),
        (f"{name}answers", "only 200 and 400", _codes(part),
         "only_200_and_400"),
    ]  # fmt: skip


def _plain(part: dict[str, Any]) -> list[Row]:
    return [
        (
            f"{name.replace(' x ', ' connections, ')} texts a request, against plain FastAPI",
            "not behind",
            f"{case['serve_per_s']:.0f} requests a second against {case['plain_per_s']:.0f} "
            f"({case['ratio']:.2f}x)",
            f"{name} not behind",
        )
        for name, case in part["cases"].items()
    ]


_ROWS = {
    "latency": _latency,
    "throughput": _throughput,
    "drain": _drain,
    "overload": _overload,
    "overload_shared": _overload,
    "soak": _soak,
    "cost": _cost,
    "plain": _plain,
    "plain_shared": _plain,
}


def serving_tables(document: dict[str, Any]) -> list[Table]:
    """Return the figures with their goals; a missed goal is marked."""
    found = document["scenarios"]
    body = []
    for name, rows in _ROWS.items():
        if name not in found:
            continue
        for figure, goal, measured, promise in rows(found[name]):
            missed = promise is not None and not found[name]["held"][promise]
            body.append([figure, goal, f"**{measured}, missed**" if missed else measured])
    model = document["model"]
    note = f"Bundle {model['student']} {model['version']}, target {model['target']}, {model['mb']} MB."
    return [Table("Serving over loopback", note, ["figure", "goal", "measured"], body)]
