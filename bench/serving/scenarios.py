"""Scenarios of the serving benchmark, each a function that starts its own server.

Every scenario is bounded in time and in requests, stops what it started, and returns its figures with
``held``: which of the promises in ``docs/serving.md`` they keep.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from pathlib import Path
from typing import Any

from sbs_edge.bench.serving.client import (
    BlockingClient,
    Client,
    closed_loop,
    milliseconds,
    open_loop,
    percentile,
)
from sbs_edge.bench.serving.requests import job_of, mixed_requests, requests_of, some_texts
from sbs_edge.bench.serving.server import Cores, ServerUnderTest
from sbs_edge.runtime.student import Student

__all__ = ["cost", "drain", "latency", "soak", "throughput"]

_NO_QUEUE_LIMIT = ("--max-queue-ms", "600000", "--max-queue-texts", "100000")
_GET_READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_SOAK_SHARE, _SOAK_MOST = 0.5, 0.9  # of what the server can do with the same mix: usual, and at most


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
        "readiness_off_ms": milliseconds(unready_s),
        "exit_code": code,
        "exit_s": round(exit_s, 2),
        "held": {
            "none_lost": unfinished == in_flight and all(status == 200 for status in statuses),
            "readiness_100_ms": unready_s <= 0.1,
            "exit_0": code == 0,
        },
    }


async def soak(
    bundle: Path, threads: int, requests: int, max_seconds: float, share: float = _SOAK_SHARE
) -> dict[str, Any]:
    """Many mixed requests in an open loop; memory, threads and descriptors sampled 40 times on the way.

    The rate is ``share`` of what the server can do with the mix, or more where all ``requests`` would not
    be sent within ``max_seconds`` otherwise. A request for which no connection is free waits for one.
    """
    samples: list[tuple[int, float, int, int]] = []
    step = max(1, requests // 40)
    jobs = mixed_requests(4096)
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
        "p50_ms": milliseconds(percentile(record.latencies(200), 50)),
        "p99_ms": milliseconds(percentile(record.latencies(200), 99)),
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
    texts = some_texts()
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
    texts = some_texts(calls)
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
                raw, _ = job_of([text])
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
        "in_process_p50_ms": milliseconds(statistics.median(direct)),
        "served_p50_ms": milliseconds(statistics.median(served)),
        "added_p50_ms": milliseconds(added),
        "held": {"added_1_ms": added <= 0.001},
    }
