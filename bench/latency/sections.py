"""The timed parts of the latency bench: interleaved rounds over label, rationale, stream and load.

Every section asks the systems in turn within a round (A B C, then B C A, ...), so that a change of the
machine's speed affects all of them. It keeps a value for each round, from which ratios are made.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sbs_edge.bench.core.results import Row
from sbs_edge.bench.core.rounds import Series, median_row, rotated
from sbs_edge.bench.latency.inputs import poisson_arrivals
from sbs_edge.bench.latency.workers import Benchmark, Entry

__all__ = ["COMMON_RATE", "Schedule", "label", "open_loop", "rationale", "throughput"]

COMMON_RATE = "common rate"


@dataclass(slots=True)
class Schedule:
    """Durations and numbers of rounds.

    Attributes:
        rounds: interleaved rounds of every section at most.
        least_rounds: rounds run even when the time is over.
        seconds: time of the whole bench; sections share it out.
        call_seconds: time of one measurement inside a round.
        sources: source lengths in tokens.
        batches: batch sizes of the label task.
        rationale_batches: batch sizes of the rationale task.
        rationale_steps: new tokens of a rationale.
        stream: requests of the mixed stream at most.
        loads: shares of a system's own capacity offered in the open loop.
        load_seconds: length of one open-loop run.
        cold_rounds: new processes of each system.
    """

    rounds: int = 10
    least_rounds: int = 3
    seconds: float = 300.0
    call_seconds: float = 0.15
    sources: tuple[int, ...] = (16, 64, 256)
    batches: tuple[int, ...] = (1, 8)
    rationale_batches: tuple[int, ...] = (1,)
    rationale_steps: int = 64
    stream: int = 128
    loads: tuple[float, ...] = (0.5, 0.8)
    load_seconds: float = 3.0
    cold_rounds: int = 5

    def rounds_within(self, share: float) -> Iterator[int]:
        """Yield round numbers until this section's share of the time is used up."""
        end = time.monotonic() + share * self.seconds
        for number in range(self.rounds):
            if number >= self.least_rounds and time.monotonic() > end:
                return
            yield number


def _measured(entries: list[Entry], number: int) -> list[Entry]:
    """Return the entries with a worker, in this round's order."""
    return [entry for entry in rotated(entries, number) if entry.worker is not None]


def label(benchmark: Benchmark, schedule: Schedule, share: float, say: Callable[[str], None]) -> list[Row]:
    """Label latency by batch and source length; peers as label + EOS and as a single token."""
    inputs = benchmark.inputs
    cases = [
        (batch, source)
        for source in schedule.sources
        for batch in schedule.batches
        if source <= inputs.max_source_tokens
    ]
    texts = {case: inputs.texts(case[1], case[0]) for case in cases}
    tokens = {case: max(map(inputs.count, texts[case])) for case in cases}
    found: dict[tuple[str, str, tuple[int, int]], Series] = {}
    for number in schedule.rounds_within(share):
        say(f"label, round {number + 1}")
        for case in cases:
            for entry in _measured(benchmark.participants("label"), number):
                for variant in entry.variants:
                    series = found.setdefault((entry.name, variant, case), Series())
                    reply = entry.ask(
                        "label",
                        texts=texts[case],
                        choices=inputs.choice_sets(case[0]),
                        variant=variant,
                        seconds=schedule.call_seconds,
                        least=1,
                        warm=series.warm,
                    )
                    if reply is not None:
                        series.add(reply["ns"])
    return [
        series.row(
            "label", name, variant, f"batch {case[0]}, {case[1]} tokens",
            batch=case[0], source=case[1], tokens=tokens[case],
        )
        for (name, variant, case), series in found.items()
        if series.rounds
    ]  # fmt: skip


def rationale(
    benchmark: Benchmark, schedule: Schedule, share: float, say: Callable[[str], None]
) -> list[Row]:
    """Time to the first token, time a token after it, tokens a second end to end."""
    inputs, source = benchmark.inputs, min(64, benchmark.inputs.max_source_tokens)
    whole: dict[tuple[str, int], Series] = {}
    first: dict[tuple[str, int], Series] = {}
    counts: dict[tuple[str, int], list[int]] = {}
    for number in schedule.rounds_within(share):
        say(f"rationale, round {number + 1}")
        for batch in schedule.rationale_batches:
            texts = inputs.texts(source, batch)
            for entry in _measured(benchmark.participants("rationale"), number):
                key = (entry.name, batch)
                replies = []
                for table, steps in ((first, 1), (whole, schedule.rationale_steps)):
                    into = table.setdefault(key, Series())
                    order = {"seconds": schedule.call_seconds, "least": 1, "warm": into.warm}
                    replies.append(entry.ask("rationale", texts=texts, steps=steps, **order))
                if all(reply is not None for reply in replies):
                    for table, reply in zip((first, whole), replies, strict=True):
                        table[key].add(reply["ns"] if reply else [])
                    counts[key] = replies[1]["tokens"] if replies[1] else []
    rows: list[Row] = []
    for key, series in whole.items():
        if not series.rounds:
            continue
        name, batch = key
        case = f"batch {batch}, {source} tokens, {schedule.rationale_steps} new"
        new = max(counts[key])
        total = sum(counts[key])
        extra: dict[str, Any] = {"batch": batch, "source": source, "new_tokens": counts[key]}
        pairs = list(zip(series.rounds, first[key].rounds, strict=True))
        rate = [total / ms * 1e3 for ms, _ in pairs]
        each = [(ms - start) / max(1, new - 1) for ms, start in pairs]
        rows.append(series.row("rationale", name, "whole", case, **extra))
        rows.append(first[key].row("rationale", name, "first token", case, **extra))
        rows.append(median_row("rationale", name, "a token", case, "ms", each, **extra))
        rows.append(median_row("rationale", name, "rate", case, "tokens/s", rate, **extra))
    return rows


def throughput(
    benchmark: Benchmark, schedule: Schedule, share: float, say: Callable[[str], None]
) -> list[Row]:
    """Requests a second on a mixed-length stream, each system at its best batching setting."""
    texts = benchmark.inputs.stream(schedule.stream)
    sizes: dict[str, int] = {}
    sweep: dict[str, list[dict[str, Any]]] = {}
    budget = share * schedule.seconds / max(1, 8 * len(benchmark.alive))
    for entry in benchmark.alive:
        say(f"throughput, sweep of {entry.name}")
        reply = entry.ask("settings")
        best: tuple[float, dict[str, Any]] | None = None
        for setting in reply["settings"] if reply else []:
            if entry.ask("apply", setting=setting) is None:
                break
            if entry.name not in sizes:  # how many requests fit the time
                probe = _stream(entry, texts[:8], setting, benchmark)
                if probe is None:
                    break
                sizes[entry.name] = min(len(texts), max(8, int(8 * budget / probe)))
            n = sizes[entry.name]
            seconds = _stream(entry, texts[:n], setting, benchmark)
            if seconds is None:
                break
            rate = n / seconds
            sweep.setdefault(entry.name, []).append({"setting": setting, "requests_per_s": round(rate, 2)})
            if best is None or rate > best[0]:
                best = (rate, setting)
        if best is not None:
            entry.facts["setting"] = best[1]
            entry.ask("apply", setting=best[1])
    rates: dict[str, list[float]] = {}
    for number in schedule.rounds_within(share / 2):
        say(f"throughput, round {number + 1}")
        for entry in _measured(benchmark.entries, number):
            if "setting" not in entry.facts:
                continue
            n = sizes[entry.name]
            seconds = _stream(entry, texts[:n], entry.facts["setting"], benchmark)
            if seconds is not None:
                rates.setdefault(entry.name, []).append(n / seconds)
    rows = []
    for entry in benchmark.entries:
        if entry.name in rates:
            extra = {
                "setting": entry.facts["setting"],
                "sweep": sweep[entry.name],
                "requests": sizes[entry.name],
            }
            row = median_row(
                "throughput", entry.name, "", "mixed stream", "requests/s", rates[entry.name], **extra
            )
            entry.facts["capacity"] = row.value
            rows.append(row)
    return rows


def _stream(entry: Entry, texts: list[str], setting: dict[str, Any], benchmark: Benchmark) -> float | None:
    choices = benchmark.inputs.choice_sets(len(texts))
    reply = entry.ask("stream", texts=texts, setting=setting, choices=choices)
    return None if reply is None else float(reply["ns"][0]) * 1e-9


def open_loop(
    benchmark: Benchmark, schedule: Schedule, share: float, say: Callable[[str], None]
) -> list[Row]:
    """Latency under Poisson arrivals: at shares of each system's own capacity, and at one common rate.

    The common rate is half of the fastest peer's capacity. A system that cannot follow is reported
    as saturated. Up to 8 waiting requests are served together.
    """
    capacities = {
        entry.name: float(entry.facts["capacity"]) for entry in benchmark.alive if "capacity" in entry.facts
    }
    peers = [rate for name, rate in capacities.items() if not name.startswith("sbs-edge")]
    common = 0.5 * max(peers or capacities.values(), default=0.0)
    found: dict[tuple[str, str], Series] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    runs = len(capacities) * (len(schedule.loads) + 1)
    seconds = min(schedule.load_seconds, max(0.3, share * schedule.seconds / max(1, runs)))
    for number in range(max(1, min(3, int(share * schedule.seconds / max(1e-9, runs * seconds))))):
        say(f"open loop, round {number + 1}")
        for entry in _measured(benchmark.entries, number):
            if entry.name not in capacities:
                continue
            offers = {f"{load:.0%} of its capacity": load * capacities[entry.name] for load in schedule.loads}
            for case, rate in {**offers, COMMON_RATE: common}.items():
                rng = random.Random(f"{benchmark.inputs.seed}/{case}/{number}")
                arrivals = poisson_arrivals(rate, seconds, rng)
                texts = benchmark.inputs.stream(len(arrivals))
                reply = entry.ask(
                    "open_loop",
                    texts=texts,
                    choices=benchmark.inputs.choice_sets(len(texts)),
                    arrivals=arrivals,
                    setting=entry.facts["setting"],
                    most=8,
                    patience=max(2.0, seconds),
                )
                if reply is None or not reply["ns"]:
                    break
                found.setdefault((entry.name, case), Series()).add(reply["ns"])
                fact = facts.setdefault((entry.name, case), {"rate": round(rate, 2), "unanswered": 0})
                fact["unanswered"] += reply["left"]
                fact["saturated"] = fact["unanswered"] > 0 or rate > capacities[entry.name]
    return [
        series.row("open_loop", name, "", case, **facts[(name, case)])
        for (name, case), series in found.items()
    ]
