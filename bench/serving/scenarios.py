"""Scenarios of the serving benchmark, each a function that starts its own server.

Every scenario is bounded in time and in requests, stops what it started, and returns its figures with
``held``: which of the promises in ``docs/serving.md`` they keep.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import random
import signal
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sbs_edge.bench.serving.client import (
    BlockingClient,
    Client,
    Job,
    Record,
    closed_loop,
    open_loop,
    percentile,
    request_bytes,
)
from sbs_edge.bench.serving.server import Cores, ServerUnderTest
from sbs_edge.data.builtin import builtin_splits
from sbs_edge.runtime.student import Student

__all__ = ["cost", "drain", "latency", "overload", "requests_of", "soak", "throughput"]

_NO_QUEUE_LIMIT = ("--max-queue-ms", "600000", "--max-queue-texts", "100000")
_GET_READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_TURN_S = 5.0  # of overload, between two measurements of the peak
_FILL = 0.2  # share of a turn left out at its start: first answers come late while the queue fills
_SOAK_SHARE, _SOAK_MOST = 0.5, 0.9  # of what the server can do with the same mix: usual, and at most


def _texts(n: int = 512) -> list[str]:
    rows = [example.input for example in builtin_splits("ci").test]
    return (rows * (n // len(rows) + 1))[:n]


def _job(texts: list[str], explain: bool = False) -> Job:
    body = json.dumps({"texts": texts, "explain": explain}).encode()
    return request_bytes("/v1/predict", body), len(texts)


def requests_of(n_texts: int, count: int = 64, explain: bool = False) -> list[Job]:
    """Return prepared requests of ``n_texts`` texts each, the same ones every time."""
    rng, texts = random.Random(0), _texts()
    return [_job(rng.sample(texts, n_texts), explain) for _ in range(count)]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


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
    around = [(a + b) / 2 for a, b in itertools.pairwise(texts_per_s for texts_per_s, _ in peaks)]
    goods = [record.goodput(_FILL * turn_s) for record in records]
    unsent = sum(record.unsent for record in records)
    shares = [good / peak for good, peak in zip(goods, around, strict=True)]
    codes = dict(sorted(sum((Counter(r.codes) for r in records), Counter()).items()))
    refused = [s for r in records for s in r.answer_times(429)]
    accepted = [s for r in records for s in r.latencies(200)]
    lasted = sum(r.seconds for r in records)
    calm_p99 = percentile(calm.latencies(200), 99)
    return {
        "seconds": seconds,
        "cores": {"server": cores[0], "client": cores[1]},
        "texts_per_request": texts_per_request,
        "peak_texts_per_s": round(statistics.median(around), 1),
        "peaks_texts_per_s": [round(texts_per_s, 1) for texts_per_s, _ in peaks],
        "first_peak_texts_per_s": round(peak, 1),
        "peak_server_cpu_s": round(before_cpu, 2),
        "peak_client_cpu_s": round(before.cpu_s, 2),
        "peak_seconds": round(before.seconds, 2),
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
        "rejection_p50_ms": _ms(percentile(refused, 50)),
        "rejection_p99_ms": _ms(percentile(refused, 99)),
        "rejection_p99_from_due_ms": _ms(percentile([s for r in records for s in r.latencies(429)], 99)),
        "client_late_p99_ms": _ms(percentile([s for r in records for s in r.lateness], 99)),
        "client_loop_late_p99_ms": _ms(percentile([s for r in records for s in r.oversleep], 99)),
        "accepted_p50_ms": _ms(percentile(accepted, 50)),
        "accepted_p99_ms": _ms(percentile(accepted, 99)),
        "calm_p99_ms": _ms(calm_p99),
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


async def cost(bundle: Path, threads: int, cores: Cores, requests: int = 5000) -> dict[str, Any]:
    """Processor time of an answered and of a refused request, for server and client apart.

    Refusals are measured alone: one request whose body never comes holds the only place.
    """
    figures: dict[str, Any] = {"cores": {"server": cores[0], "client": cores[1]}, "requests": requests}
    for n_texts in (1, 16):
        with ServerUnderTest(bundle, "--threads", str(threads), "--no-access-log", cores=cores) as server:
            client = Client(server.port)
            await closed_loop(client, requests_of(n_texts), concurrency=8, count=200)
            cpu = server.cpu_s
            record = await closed_loop(
                client, requests_of(n_texts), concurrency=8, count=requests // n_texts, seconds=30
            )
            cpu, n = server.cpu_s - cpu, len(record.outcomes)
            figures[f"answered_{n_texts}_texts"] = {
                "requests": n,
                "server_us": round(1e6 * cpu / n, 1),
                "client_us": round(1e6 * record.cpu_s / n, 1),
            }
            await client.close()
    alone = ("--max-concurrent", "1", "--timeout-s", "600", "--body-timeout-s", "600", "--drain-timeout", "0")
    with ServerUnderTest(bundle, "--threads", str(threads), *alone, cores=cores) as server:
        client, plug = Client(server.port), Client(server.port, most=1)
        held = asyncio.create_task(
            plug.send(b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n")
        )
        while not await asyncio.to_thread(server.metric, "sbs_edge_requests_in_flight"):
            pass
        await closed_loop(client, requests_of(16), concurrency=8, count=500)
        cpu = server.cpu_s
        record = await closed_loop(client, requests_of(16), concurrency=8, count=requests)
        cpu, n = server.cpu_s - cpu, len(record.outcomes)
        figures["refused"] = {
            "requests": n,
            "codes": record.codes,
            "server_us": round(1e6 * cpu / n, 1),
            "client_us": round(1e6 * record.cpu_s / n, 1),
        }
        await client.close()
        held.cancel()
    figures["held"] = {"only_429": record.codes == {"429": n}}
    return figures


async def drain(bundle: Path, threads: int, in_flight: int = 200) -> dict[str, Any]:
    """SIGTERM with ``in_flight`` requests inside, all behind work that takes seconds."""
    with ServerUnderTest(
        bundle, "--threads", str(threads), "--no-access-log", "--max-batch-tokens", "64", *_NO_QUEUE_LIMIT
    ) as server:
        client, probe = Client(server.port), Client(server.port, most=1)
        plug = [asyncio.create_task(client.send(raw)) for raw, _ in requests_of(32, 40, explain=True)]
        await asyncio.sleep(0.3)
        mine = [asyncio.create_task(client.send(raw)) for raw, _ in requests_of(1, in_flight, explain=True)]
        end = time.monotonic() + 30
        inside = 0.0
        while time.monotonic() < end and inside < in_flight + len(plug):
            answered = sum(task.done() for task in plug)  # before the look inside: never counts twice
            inside = answered + await asyncio.to_thread(server.metric, "sbs_edge_requests_in_flight")
        unfinished = sum(not task.done() for task in mine)
        await probe.send(_GET_READY)
        told = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        while (await probe.send(_GET_READY))[0] == 200 and time.perf_counter() - told < 5:
            pass
        unready_s = time.perf_counter() - told
        statuses = [status for status, _ in await asyncio.gather(*mine)]
        await asyncio.gather(*plug)
        code = await asyncio.to_thread(server.process.wait, 40)
        exit_s = time.perf_counter() - told
        await client.close()
        await probe.close()
    return {
        "in_flight_at_sigterm": unfinished,
        "lost": sum(status != 200 for status in statuses),
        "readiness_off_ms": _ms(unready_s),
        "exit_code": code,
        "exit_s": round(exit_s, 2),
        "held": {
            "none_lost": unfinished == in_flight and all(status == 200 for status in statuses),
            "readiness_100_ms": unready_s <= 0.1,
            "exit_0": code == 0,
        },
    }


def _mixed(n: int) -> list[Job]:
    """A mix of what a server meets: sizes, rationales, both protocols, compression, mistakes."""
    rng, texts = random.Random(1), _texts()
    jobs: list[Job] = []
    for _ in range(n):
        kind = rng.random()
        size = min(32, 1 + int(rng.expovariate(0.5)))
        chosen = [
            " ".join(rng.sample(text.split(), rng.randint(1, len(text.split()))))
            for text in rng.sample(texts, size)
        ]
        if kind < 0.05:
            jobs.append(_job(chosen[:2], explain=True))
        elif kind < 0.3:
            tensor = {"name": "text", "datatype": "BYTES", "shape": [size], "data": chosen}
            name = "/v2/models/bench/infer"
            jobs.append((request_bytes(name, json.dumps({"inputs": [tensor]}).encode()), size))
        elif kind < 0.4:
            packed = gzip.compress(json.dumps({"texts": chosen}).encode())
            jobs.append((request_bytes("/v1/predict", packed, "Content-Encoding: gzip\r\n"), size))
        elif kind < 0.45:
            bad = rng.choice([b"{", b'{"texts": []}', json.dumps({"texts": ["word " * 5000]}).encode()])
            jobs.append((request_bytes("/v1/predict", bad), 0))
        else:
            jobs.append(_job(chosen))
    return jobs


async def soak(
    bundle: Path, threads: int, requests: int, max_seconds: float, share: float = _SOAK_SHARE
) -> dict[str, Any]:
    """Many mixed requests in an open loop; memory, threads and descriptors sampled 40 times on the way.

    The rate is ``share`` of what the server can do with the mix, or more where all ``requests`` would not
    be sent within ``max_seconds`` otherwise. A request for which no connection is free waits for one.
    """
    samples: list[tuple[int, float, int, int]] = []
    step = max(1, requests // 40)
    jobs = _mixed(4096)
    options = ("--threads", str(threads), "--no-access-log", *_NO_QUEUE_LIMIT)
    with ServerUnderTest(f"bench={bundle}", *options) as server:
        client = Client(server.port)
        probe = await closed_loop(client, jobs, concurrency=16, seconds=min(6.0, max_seconds / 10))
        capacity = len(probe.outcomes) / probe.seconds
        share = max(share, min(_SOAK_MOST, requests / (0.9 * max_seconds) / capacity))
        await client.close()
        await _connections_gone(server)
        start = (server.n_threads, server.n_descriptors(connections=True))

        def look(done: int) -> None:
            if done % step == 0:
                samples.append((done, server.rss_mib, server.n_threads, server.n_descriptors()))

        client, cpu = Client(server.port), server.cpu_s
        await client.open(512)
        record = await open_loop(
            client, jobs, rate=share * capacity, seconds=max_seconds, count=requests, each=look, patient=True
        )
        await client.close()
        await _connections_gone(server)
        end, cpu = (server.n_threads, server.n_descriptors(connections=True)), server.cpu_s - cpu
    n = len(record.outcomes)
    settled = [s for s in samples if s[0] >= 0.2 * n] or samples
    slope = 0.0
    if len(settled) > 1:
        fit = statistics.linear_regression([s[0] for s in settled], [s[1] for s in settled])
        slope = fit.slope * 10_000
    return {
        "requests": n,
        "unsent_by_client": record.unsent,
        "seconds": round(record.seconds, 1),
        "rate_per_s": round(share * capacity, 1),
        "share_of_capacity": round(share, 3),
        "codes": record.codes,
        "p50_ms": _ms(percentile(record.latencies(200), 50)),
        "p99_ms": _ms(percentile(record.latencies(200), 99)),
        "server_cpu_s": round(cpu, 1),
        "client_cpu_s": round(record.cpu_s, 1),
        "rss_first_mib": round(settled[0][1], 1) if settled else None,
        "rss_last_mib": round(settled[-1][1], 1) if settled else None,
        "rss_slope_mib_per_10k": round(slope, 3),
        "threads": {"start": start[0], "end": end[0], "between": sorted({s[2] for s in settled})},
        "descriptors": {"start": start[1], "end": end[1], "files": sorted({s[3] for s in settled})},
        "samples": [(s[0], round(s[1], 1)) for s in samples],
        "held": {
            "all_sent": n >= requests,
            "only_200_and_400": set(record.codes) == {"200", "400"},
            "rss_slope_1_mib_per_10k": len(settled) > 1 and slope <= 1.0,
            "threads_constant": {s[2] for s in settled} == {start[0]} and end[0] == start[0],
            "descriptors_constant": len({s[3] for s in settled}) == 1 and end[1] == start[1],
        },
    }


async def _connections_gone(server: ServerUnderTest, most_s: float = 5.0) -> None:
    """Wait until the server has closed what the client closed, so that descriptors can be compared."""
    end, last = time.monotonic() + most_s, -1
    while time.monotonic() < end:
        now = server.n_descriptors(connections=True)
        if now == last:
            return
        last = now
        await asyncio.sleep(0.2)


async def throughput(bundle: Path, threads: int, seconds: float, rounds: int = 5) -> dict[str, Any]:
    """Texts per second over HTTP and in-process, with the same token budget, in turns."""
    texts = _texts()
    ratios, served, direct = [], [], []
    with (
        Student.load(bundle, threads=threads) as student,
        ServerUnderTest(bundle, "--threads", str(threads), "--no-access-log") as server,
    ):
        client, jobs = Client(server.port), requests_of(32)
        await closed_loop(client, jobs, concurrency=8, seconds=1)
        student.predict(texts)
        for _ in range(rounds):
            started, n = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                student.predict(texts)
                n += len(texts)
            direct.append(n / (time.perf_counter() - started))
            record = await closed_loop(client, jobs, concurrency=8, seconds=seconds)
            served.append(record.goodput())
            ratios.append(served[-1] / direct[-1])
        await client.close()
    ratio = statistics.median(ratios)
    return {
        "in_process_texts_per_s": round(statistics.median(direct), 1),
        "served_texts_per_s": round(statistics.median(served), 1),
        "ratio": round(ratio, 4),
        "ratios": [round(r, 4) for r in ratios],
        "held": {"ratio_90_percent": ratio >= 0.9},
    }


async def latency(bundle: Path, threads: int, rounds: int = 10, calls: int = 100) -> dict[str, Any]:
    """Median time of one text: the student called in-process, and over HTTP, in turns.

    The client is a socket of blocking calls: what an event loop of its own would add is not the server's.
    """
    texts = _texts(calls)
    direct, served = [], []
    with (
        Student.load(bundle, threads=threads) as student,
        ServerUnderTest(bundle, "--threads", str(threads)) as server,
        BlockingClient(server.port) as client,
    ):
        for number in range(rounds + 1):
            own, remote = [], []
            for text in texts:
                started = time.perf_counter()
                student.predict([text])
                own.append(time.perf_counter() - started)
                await asyncio.sleep(0.002)
            for text in texts:
                raw, _ = _job([text])
                started = time.perf_counter()
                status, _ = client.ask(raw)
                remote.append(time.perf_counter() - started)
                if status != 200:
                    raise RuntimeError(f"A request at low load was answered {status}.")
                await asyncio.sleep(0.002)
            if number:  # the first round warms both
                direct.append(statistics.median(own))
                served.append(statistics.median(remote))
    added = statistics.median(s - d for s, d in zip(served, direct, strict=True))
    return {
        "in_process_p50_ms": _ms(statistics.median(direct)),
        "served_p50_ms": _ms(statistics.median(served)),
        "added_p50_ms": _ms(added),
        "held": {"added_1_ms": added <= 0.001},
    }
