"""Figures of the server: overload, drain, soak, throughput and added latency, over loopback.

    python -m sbs_edge.bench.serving all BUNDLE --out serving.json
    python -m sbs_edge.bench.serving overload BUNDLE --seconds 60

Every scenario starts a server of its own, is bounded in time and in requests, and stops what it
started. The last line on stdout is one JSON document. Knows nothing of the server's insides.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sbs_edge import files
from sbs_edge.bench.serving_client import (
    Client,
    Job,
    ServerUnderTest,
    closed_loop,
    open_loop,
    percentile,
    request_bytes,
)
from sbs_edge.data.builtin import builtin_splits
from sbs_edge.runtime.student import Student

__all__ = ["Scenario", "main", "measure"]

_console = Console(stderr=True)
_NO_QUEUE_LIMIT = ("--max-queue-ms", "600000", "--max-queue-texts", "100000")


def _texts(n: int = 512) -> list[str]:
    rows = [example.input for example in builtin_splits("ci").test]
    return (rows * (n // len(rows) + 1))[:n]


def _job(texts: list[str], explain: bool = False) -> Job:
    body = json.dumps({"texts": texts, "explain": explain}).encode()
    return request_bytes("/v1/predict", body), len(texts)


def _jobs(n_texts: int, count: int = 64, explain: bool = False) -> list[Job]:
    rng, texts = random.Random(0), _texts()
    return [_job(rng.sample(texts, n_texts), explain) for _ in range(count)]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


async def overload(bundle: Path, seconds: float, threads: int, texts_per_request: int = 16) -> dict[str, Any]:
    """Open loop at 4 times the measured capacity."""
    jobs = _jobs(texts_per_request)
    with ServerUnderTest(bundle, "--threads", str(threads), "--no-access-log") as server:
        client = Client(server.port)
        await closed_loop(client, jobs, concurrency=8, seconds=2)
        peaks = []
        for concurrency in (8, 16, 32):
            record = await closed_loop(client, jobs, concurrency=concurrency, seconds=4)
            peaks.append(record.good_texts_per_s)
        peak = max(peaks)
        calm = await open_loop(client, jobs, rate=0.3 * peak / texts_per_request, seconds=5, most=1000)
        # A first short overload fills every queue and connection once; growth counts from there.
        await open_loop(client, jobs, rate=4 * peak / texts_per_request, seconds=3, most=1000)
        rss_before = server.rss_mib
        record = await open_loop(client, jobs, rate=4 * peak / texts_per_request, seconds=seconds, most=1000)
        rss_after = server.rss_mib
        client.close()
    refused, accepted = record.latencies(429), record.latencies(200)
    return {
        "seconds": seconds,
        "texts_per_request": texts_per_request,
        "peak_texts_per_s": round(peak, 1),
        "offered_requests_per_s": round(4 * peak / texts_per_request, 1),
        "requests": len(record.outcomes),
        "unsent_by_client": record.unsent,
        "codes": record.codes,
        "goodput_of_peak": round(record.good_texts_per_s / peak, 4),
        "rejection_p50_ms": _ms(percentile(refused, 50)),
        "rejection_p99_ms": _ms(percentile(refused, 99)),
        "accepted_p50_ms": _ms(percentile(accepted, 50)),
        "accepted_p99_ms": _ms(percentile(accepted, 99)),
        "calm_p99_ms": _ms(percentile(calm.latencies(200), 99)),
        "rss_before_mib": round(rss_before, 1),
        "rss_after_mib": round(rss_after, 1),
        "rss_growth": round(rss_after / rss_before - 1, 4),
        "held": {
            "only_200_and_429": set(record.codes) <= {"200", "429"},
            "rejection_p99_20_ms": percentile(refused, 99) <= 0.020,
            "goodput_90_percent": record.good_texts_per_s >= 0.9 * peak,
            "rss_growth_5_percent": rss_after <= 1.05 * rss_before,
            "accepted_p99_within_queue_budget": percentile(accepted, 99)
            <= percentile(calm.latencies(200), 99) + 1.0,
        },
    }


async def drain(bundle: Path, threads: int, in_flight: int = 200) -> dict[str, Any]:
    """SIGTERM with ``in_flight`` requests inside, all behind work that takes seconds."""
    with ServerUnderTest(
        bundle, "--threads", str(threads), "--no-access-log", "--max-batch-tokens", "64", *_NO_QUEUE_LIMIT
    ) as server:
        client, probe = Client(server.port), Client(server.port, most=1)
        plug = [asyncio.create_task(client.send(raw)) for raw, _ in _jobs(32, 40, explain=True)]
        await asyncio.sleep(0.3)
        mine = [asyncio.create_task(client.send(raw)) for raw, _ in _jobs(1, in_flight, explain=True)]
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
        client.close()
        probe.close()
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


_GET_READY = b"GET /v2/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


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
            bad = rng.choice([b"{", b'{"texts": []}', json.dumps({"texts": ["word " * 400]}).encode()])
            jobs.append((request_bytes("/v1/predict", bad), 0))
        else:
            jobs.append(_job(chosen))
    return jobs


async def soak(bundle: Path, threads: int, requests: int, max_seconds: float) -> dict[str, Any]:
    """Many mixed requests; memory, threads and descriptors are sampled 40 times on the way."""
    samples: list[tuple[int, float, int, int]] = []
    step = max(1, requests // 40)
    with ServerUnderTest(Path(f"bench={bundle}"), "--threads", str(threads), "--no-access-log") as server:
        client = Client(server.port)

        def look(done: int) -> None:
            if done % step == 0:
                samples.append((done, server.rss_mib, server.n_threads, server.n_descriptors))

        record = await closed_loop(
            client, _mixed(4096), concurrency=16, count=requests, seconds=max_seconds, each=look
        )
        client.close()
    settled = [s for s in samples if s[0] >= 0.2 * requests] or samples
    slope = 0.0
    if len(settled) > 1:
        fit = statistics.linear_regression([s[0] for s in settled], [s[1] for s in settled])
        slope = fit.slope * 10_000
    return {
        "requests": len(record.outcomes),
        "seconds": round(record.seconds, 1),
        "codes": record.codes,
        "rss_first_mib": round(settled[0][1], 1),
        "rss_last_mib": round(settled[-1][1], 1),
        "rss_slope_mib_per_10k": round(slope, 3),
        "threads": sorted({s[2] for s in settled}),
        "descriptors": sorted({s[3] for s in settled}),
        "samples": [(s[0], round(s[1], 1)) for s in samples],
        "held": {
            "all_sent": len(record.outcomes) >= requests,
            "only_200_and_400": set(record.codes) <= {"200", "400"},
            "rss_slope_1_mib_per_10k": slope <= 1.0,
            "threads_constant": len({s[2] for s in settled}) == 1,
            "descriptors_constant": len({s[3] for s in settled}) == 1,
        },
    }


async def throughput(bundle: Path, threads: int, seconds: float, rounds: int = 5) -> dict[str, Any]:
    """Texts per second over HTTP and in-process, with the same token budget, in turns."""
    texts = _texts()
    ratios, served, direct = [], [], []
    with (
        Student.load(bundle, threads=threads) as student,
        ServerUnderTest(bundle, "--threads", str(threads), "--no-access-log") as server,
    ):
        client, jobs = Client(server.port), _jobs(32)
        await closed_loop(client, jobs, concurrency=8, seconds=1)
        student.predict(texts)
        for _ in range(rounds):
            started, n = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                student.predict(texts)
                n += len(texts)
            direct.append(n / (time.perf_counter() - started))
            record = await closed_loop(client, jobs, concurrency=8, seconds=seconds)
            served.append(record.good_texts_per_s)
            ratios.append(served[-1] / direct[-1])
        client.close()
    ratio = statistics.median(ratios)
    return {
        "in_process_texts_per_s": round(statistics.median(direct), 1),
        "served_texts_per_s": round(statistics.median(served), 1),
        "ratio": round(ratio, 4),
        "ratios": [round(r, 4) for r in ratios],
        "held": {"ratio_90_percent": ratio >= 0.9},
    }


async def latency(bundle: Path, threads: int, rounds: int = 10, calls: int = 100) -> dict[str, Any]:
    """Median time of one text: the student called in-process, and over HTTP, in turns."""
    texts = _texts(calls)
    direct, served = [], []
    with (
        Student.load(bundle, threads=threads) as student,
        ServerUnderTest(bundle, "--threads", str(threads)) as server,
    ):
        client = Client(server.port)
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
                status, _ = await client.send(raw)
                remote.append(time.perf_counter() - started)
                if status != 200:
                    raise RuntimeError(f"A request at low load was answered {status}.")
                await asyncio.sleep(0.002)
            if number:  # the first round warms both
                direct.append(statistics.median(own))
                served.append(statistics.median(remote))
        client.close()
    added = statistics.median(s - d for s, d in zip(served, direct, strict=True))
    return {
        "in_process_p50_ms": _ms(statistics.median(direct)),
        "served_p50_ms": _ms(statistics.median(served)),
        "added_p50_ms": _ms(added),
        "held": {"added_1_ms": added <= 0.001},
    }


class Scenario(StrEnum):
    """What to measure."""

    overload = "overload"
    drain = "drain"
    soak = "soak"
    throughput = "throughput"
    latency = "latency"
    all = "all"


def measure(
    scenario: Scenario, bundle: Path, *, seconds: float = 60.0, requests: int = 100_000, threads: int = 1
) -> dict[str, Any]:
    """Run one scenario or all; return the figures and the machine they hold for."""
    steps: dict[Scenario, Callable[[], Any]] = {
        Scenario.latency: lambda: latency(bundle, threads),
        Scenario.throughput: lambda: throughput(bundle, threads, min(seconds, 4.0)),
        Scenario.drain: lambda: drain(bundle, threads),
        Scenario.overload: lambda: overload(bundle, seconds, threads),
        Scenario.soak: lambda: soak(bundle, threads, requests, max_seconds=1200),
    }
    result: dict[str, Any] = {
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "threads": threads,
        }
    }
    for name, step in steps.items():
        if scenario in (name, Scenario.all):
            _console.print(f"{name} ...", highlight=False)
            result[name.value] = asyncio.run(step())
            _console.print_json(data=result[name.value]["held"])
    return result


def main(
    scenario: Annotated[Scenario, typer.Argument(help="What to measure.")],
    bundle: Annotated[Path, typer.Argument(help="A bundle with a closed label set and rationales.")],
    seconds: Annotated[float, typer.Option(help="Length of the overload.")] = 60.0,
    requests: Annotated[int, typer.Option(help="Requests of the soak.")] = 100_000,
    threads: Annotated[int, typer.Option(help="Threads of one inference, served and in-process.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Also write the document to this file.")] = None,
) -> None:
    """Measure the server over loopback; the last line is JSON. Exit 1 if a figure was missed."""
    if threads == 1:  # the same single thread for the tokenizer, here and in the server
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = measure(scenario, bundle, seconds=seconds, requests=requests, threads=threads)
    if out:
        files.write_json(out, result)
    sys.stdout.write(json.dumps(result) + "\n")
    held = [ok for part in result.values() for ok in part.get("held", {}).values()]
    if not all(held):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
