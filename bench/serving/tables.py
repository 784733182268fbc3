"""Tables of a serving document: goals, measured figures and processor time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sbs_edge.bench.core.tables import Table

__all__ = ["serving_tables"]

# Of a scenario: figure, goal, measured, and the name of the promise in "held"; texts are filled from its figures.
_ROWS: dict[str, tuple[tuple[str, str, str, str | None], ...]] = {
    "latency": (
        ("added p50 at low load", "at most 1 ms",
         "{added_p50_ms:.2f} ms, over {in_process_p50_ms:.2f} ms in process", "added_1_ms"),
    ),
    "throughput": (
        ("throughput against in-process", "at least 90 %", "{ratio:.1%} ({served_texts_per_s:.0f} texts a second)",
         "ratio_90_percent"),
    ),
    "drain": (
        ("SIGTERM with {in_flight_at_sigterm} requests in flight", "none lost", "{lost} lost", "none_lost"),
        ("readiness off", "within 100 ms", "{readiness_off_ms:.1f} ms", "readiness_100_ms"),
        ("exit", "code 0", "code {exit_code} after {exit_s:.1f} s", "exit_0"),
    ),
    "overload": (
        ("{overload}answers", "only 200 and 429", "{all_codes}", "only_200_and_429"),
        ("{overload}rejection p99", "at most 20 ms", "{rejection_p99_ms:.1f} ms", "rejection_p99_20_ms"),
        ("{overload}goodput of peak", "at least 90 %",
         "{goodput_of_peak:.1%} of {peak_texts_per_s:.0f} texts a second (median of {n_turns} turns, "
         "{worst_turn:.1%} to {best_turn:.1%}), with {rejections_per_s:.0f} rejections a second", "goodput_90_percent"),
        ("{overload}growth of memory", "at most 5 %", "{rss_growth:.1%}", "rss_growth_5_percent"),
        ("{overload}accepted p99", "unloaded p99 and 1 s of queue",
         "{accepted_p99_ms:.0f} ms (unloaded {calm_p99_ms:.0f} ms)", "accepted_p99_within_queue_budget"),
        ("{overload}processor time", "",
         "server {server_cpu_s:.1f} s, client {client_cpu_s:.1f} s, not sent for want of a connection "
         "{unsent_by_client}", None),
        ("{overload}the client's own lateness, p99", "",
         "{client_late_p99_ms:.1f} ms after a request was due, its loop {client_loop_late_p99_ms:z.1f} ms", None),
    ),
    "soak": (
        ("{soak}sent within its time", "all", "{requests} requests", "all_sent"),
        ("{soak}growth of memory", "at most 1 MiB per 10,000", "{rss_slope_mib_per_10k:.2f} MiB per 10,000",
         "rss_slope_1_mib_per_10k"),
        ("{soak}threads", "constant", "{threads[start]} before, {threads[end]} after", "threads_constant"),
        ("{soak}descriptors", "constant", "{descriptors[start]} before, {descriptors[end]} after",
         "descriptors_constant"),
        ("{soak}answers", "only 200 and 400", "{all_codes}", "only_200_and_400"),
    ),
    "cost": tuple(
        (f"processor time of {name}", "",
         f"server {{{key}[server_us]:.0f}} us, client {{{key}[client_us]:.0f}} us", None)
        for key, name in (
            ("answered_1_texts", "an answered request of 1 text"),
            ("answered_16_texts", "an answered request of 16 texts"),
            ("refused", "a refused request of 16 texts"),
        )
    ),
    "plain": (
        ("{connections} connections, {n_texts} texts a request, against plain FastAPI{servers}", "not behind",
         "{serve_per_s:.0f} requests a second against {plain_per_s:.0f} ({ratio:.2f}x)",
         "{connections} x {n_texts} not behind"),
    ),
}  # fmt: skip


def _facts(name: str, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what the rows of a scenario are filled with: once, or for each case of ``plain``."""
    if name == "plain":
        for case, figures in part["cases"].items():
            connections, _, n_texts = case.partition(" x ")
            servers = f", {part['workers']} processes a server" if part["workers"] > 1 else ""
            if part["cores"]["server"] == part["cores"]["client"]:
                servers += ", shared processors"
            yield {**figures, "connections": connections, "n_texts": n_texts, "servers": servers}
        return
    codes = ", ".join(f"{n} x {code}" for code, n in part.get("codes", {}).items())
    facts = {**part, "all_codes": codes}
    if name == "overload":
        cores, turns = part["cores"], part["goodput_of_peak_by_turn"]
        where = "shared processors" if cores["server"] == cores["client"] else "processors of their own"
        facts |= {"n_turns": len(turns), "worst_turn": min(turns), "best_turn": max(turns)}
        facts["overload"] = f"4x overload, {part['seconds']:.0f} s, client and server on {where}: "
    if name == "soak":
        facts["soak"] = f"soak of {part['requests']} mixed requests in {part['seconds']:.0f} s: "
    yield facts


def _further_commands(document: dict[str, Any]) -> list[str]:
    """Return the commands of scenarios that the document's own command did not run."""
    found = []
    for key, part in document["scenarios"].items():
        command = part.get("command")
        if command is None and key == "plain":  # older results did not keep it; "all" leaves plain out
            rounds = len(next(iter(part["cases"].values()))["ratios"])
            found.append(f"`sbs-edge bench serving plain BUNDLE --rounds {rounds}`")
        elif command not in (None, document["command"]):
            found.append(f"`{' '.join(command)}`")
    return list(dict.fromkeys(found))


def serving_tables(document: dict[str, Any]) -> list[Table]:
    """Return the figures with their goals; a missed goal is marked."""
    body = []
    # A key is the scenario's name, "_shared" where the client shares processors, and the number of processes.
    parts = [(key.partition("_")[0], part) for key, part in document["scenarios"].items()]
    for name, part in sorted(parts, key=lambda item: list(_ROWS).index(item[0])):
        for facts in _facts(name, part):
            for figure, goal, measured, promise in _ROWS[name]:
                if "{client_late" in measured and "client_late_p99_ms" not in part:
                    continue  # a result of an older version
                text = measured.format_map(facts).replace("%", " %")
                missed = promise is not None and not part["held"][promise.format_map(facts)]
                body.append([figure.format_map(facts), goal, f"**{text}, missed**" if missed else text])
    model = document["model"]
    note = f"Bundle {model['student']} {model['version']}, target {model['target']}, {model['mb']} MB."
    if commands := _further_commands(document):
        note += f" Scenarios with a command of their own: {'; '.join(commands)}."
    return [Table("Serving over loopback", note, ["figure", "goal", "measured"], body)]
