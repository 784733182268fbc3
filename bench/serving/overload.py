"""The overload scenario: four times the requests that the server can answer."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from sbs_edge.bench.serving.client import (
    Client,
    Job,
    Record,
    closed_loop,
    milliseconds,
    open_loop,
    percentile,
)
from sbs_edge.bench.serving.requests import requests_of
from sbs_edge.bench.serving.server import Cores, ServerUnderTest

__all__ = ["overload"]

_TURN_S = 5.0  # between two measurements of the peak
_FILL = 0.2  # share of a turn left out at its start: first answers come late while the queue fills


def _texts_done(record: Record) -> int:
    return sum(outcome.n_texts for outcome in record.outcomes if outcome.status == 200)


async def _peak(
    client: Client, jobs: list[Job], server: ServerUnderTest, seconds: float
) -> tuple[Record, float, int]:
    """Return the best of three closed loops, the server's processor time in it, and its concurrency."""
    best, best_cpu, width = Record(), 0.0, 8
    for concurrency in (8, 16, 32):
        cpu = server.cpu_s
        record = await closed_loop(client, jobs, concurrency=concurrency, seconds=seconds)
        if record.goodput() > best.goodput():
            best, best_cpu, width = record, server.cpu_s - cpu, concurrency
    return best, best_cpu, width


async def _peak_at(
    client: Client, jobs: list[Job], server: ServerUnderTest, seconds: float, width: int
) -> tuple[float, float]:
    """Return texts a second, and a second of the server's processor time, with ``width`` callers."""
    cpu = server.cpu_s
    record = await closed_loop(client, jobs, concurrency=width, seconds=seconds)
    return record.goodput(), _texts_done(record) / max(server.cpu_s - cpu, 1e-9)


async def overload(
    bundle: Path, threads: int, seconds: float, cores: Cores, texts_per_request: int = 16
) -> dict[str, Any]:
    """Open loop at 4 times the measured peak; peak and overload on the same processors.

    The overload is cut in turns of :data:`_TURN_S`, and the peak is measured before and after each, because
    the speed of a shared machine changes within seconds by more than the effect to be found. A turn offers
    4 times the peak before it. Its goodput, once the queue is full, is compared with the mean of the two
    peaks around it, and the median over turns is reported. Refusals are timed from their sending; the
    client's own lateness is reported separately.
    """
    jobs = requests_of(texts_per_request)
    turns = max(2, round(seconds / _TURN_S))
    peak_s, turn_s = min(2.5, seconds / 4), seconds / turns
    with ServerUnderTest(bundle, "--threads", str(threads), "--no-access-log", cores=cores) as server:
        client = Client(server.port)
        await client.open(512)
        await closed_loop(client, jobs, concurrency=8, seconds=peak_s / 2)
        before, before_cpu, width = await _peak(client, jobs, server, peak_s)
        peak = before.goodput()
        calm = await open_loop(client, jobs, rate=0.3 * peak / texts_per_request, seconds=peak_s)
        # A first short overload fills every queue and connection once; growth counts from there.
        first_s = min(3.0, seconds / 4)
        await open_loop(client, jobs, rate=4 * peak / texts_per_request, seconds=first_s)
        rss_before = server.rss_mib
        records: list[Record] = []
        peaks = [(await _peak_at(client, jobs, server, peak_s, width))]
        cpu = 0.0
        for _ in range(turns):
            started, rate = server.cpu_s, 4 * peaks[-1][0] / texts_per_request
            records.append(await open_loop(client, jobs, rate=rate, seconds=turn_s))
            cpu += server.cpu_s - started
            peaks.append(await _peak_at(client, jobs, server, peak_s, width))
        rss_after = server.rss_mib
        await client.close()
    return {
        "seconds": seconds,
        "cores": {"server": cores[0], "client": cores[1]},
        "texts_per_request": texts_per_request,
        "first_peak_texts_per_s": round(peak, 1),
        "peak_server_cpu_s": round(before_cpu, 2),
        "peak_client_cpu_s": round(before.cpu_s, 2),
        "peak_seconds": round(before.seconds, 2),
        **_overload_figures(records, peaks, calm, seconds, _FILL * turn_s, cpu, (rss_before, rss_after)),
    }


def _overload_figures(
    records: list[Record],
    peaks: list[tuple[float, float]],
    calm: Record,
    seconds: float,
    from_s: float,
    cpu: float,
    rss_mib: tuple[float, float],
) -> dict[str, Any]:
    """Return the figures of the turns ``records``, and of the peaks (texts a second, and a server's second) around them.

    Args:
        records: the turns.
        peaks: before the first turn and after each.
        calm: answers at low load.
        seconds: length of all turns together.
        from_s: second of a turn from which its goodput counts.
        cpu: the server's processor time in the turns.
        rss_mib: its memory before and after.
    """
    around = [(a + b) / 2 for a, b in itertools.pairwise(texts_per_s for texts_per_s, _ in peaks)]
    goods = [record.goodput(from_s) for record in records]
    unsent = sum(record.unsent for record in records)
    shares = [good / peak for good, peak in zip(goods, around, strict=True)]
    codes = dict(sorted(sum((Counter(r.codes) for r in records), Counter()).items()))
    refused = [s for r in records for s in r.answer_times(429)]
    accepted = [s for r in records for s in r.latencies(200)]
    lasted = sum(r.seconds for r in records)
    calm_p99 = percentile(calm.latencies(200), 99)
    rss_before, rss_after = rss_mib
    return {
        "peak_texts_per_s": round(statistics.median(around), 1),
        "peaks_texts_per_s": [round(texts_per_s, 1) for texts_per_s, _ in peaks],
        "offered_requests_per_s": round((sum(codes.values()) + unsent) / seconds, 1),
        "requests": sum(codes.values()),
        "unsent_by_client": unsent,
        "codes": codes,
        "rejections_per_s": round(len(refused) / lasted, 1),
        "goodput_texts_per_s": round(statistics.median(goods), 1),
        "goodput_of_peak": round(statistics.median(shares), 4),
        "goodput_of_peak_by_turn": [round(share, 4) for share in shares],
        "server_cpu_s": round(cpu, 2),
        "client_cpu_s": round(sum(r.cpu_s for r in records), 2),
        # On a machine that is not quiet only this ratio means something.
        "texts_per_server_cpu_s_of_peak": round(
            sum(map(_texts_done, records)) / cpu / statistics.mean(each for _, each in peaks), 4
        ),
        "rejection_p50_ms": milliseconds(percentile(refused, 50)),
        "rejection_p99_ms": milliseconds(percentile(refused, 99)),
        "rejection_p99_from_due_ms": milliseconds(
            percentile([s for r in records for s in r.latencies(429)], 99)
        ),
        "client_late_p99_ms": milliseconds(percentile([s for r in records for s in r.lateness], 99)),
        "client_loop_late_p99_ms": milliseconds(percentile([s for r in records for s in r.oversleep], 99)),
        "accepted_p50_ms": milliseconds(percentile(accepted, 50)),
        "accepted_p99_ms": milliseconds(percentile(accepted, 99)),
        "calm_p99_ms": milliseconds(calm_p99),
        "rss_before_mib": round(rss_before, 1),
        "rss_after_mib": round(rss_after, 1),
        "rss_growth": round(rss_after / rss_before - 1, 4),
        "held": {
            "only_200_and_429": set(codes) == {"200", "429"},
            "rejection_p99_20_ms": bool(refused) and percentile(refused, 99) <= 0.020,
            "goodput_90_percent": statistics.median(shares) >= 0.9,
            "rss_growth_5_percent": rss_after <= 1.05 * rss_before,
            "accepted_p99_within_queue_budget": percentile(accepted, 99) <= calm_p99 + 1.0,
        },
    }
