"""``sbs-edge bench serving``: latency, throughput, drain, cost, overload and soak, over loopback.

Every scenario starts a server of its own, is bounded in time and in requests, and stops what it started.
Drain and soak ask for hundreds of rationales, so they suit bundles of a few million parameters; the other
scenarios suit any. The benchmark uses the server only through HTTP.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.results import new_document
from sbs_edge.bench.serving import scenarios
from sbs_edge.bench.serving.client import run
from sbs_edge.bench.serving.overload import overload
from sbs_edge.bench.serving.requests import requests_of
from sbs_edge.bench.serving.server import shared_cores, split_cores
from sbs_edge.errors import DataError
from sbs_edge.runtime.bundle import Bundle

__all__ = ["Options", "Scenario", "gathered", "measure", "shape_to_bundle"]

Say = Callable[[str], None]


class Scenario(StrEnum):
    """The parts of the benchmark."""

    latency = "latency"
    throughput = "throughput"
    drain = "drain"
    cost = "cost"
    overload = "overload"
    soak = "soak"
    plain = "plain"
    all = "all"


@dataclass(frozen=True, slots=True)
class Options:
    """Length and conditions of the scenarios.

    Args:
        seconds: length of the overload; the other timed parts are at most as long.
        requests: requests of the soak.
        soak_seconds: longest time of the soak; requests left then are reported as not sent.
        threads: threads of an inference, served and in process.
        pin: in overload, cost and plain, the client on the last processor and the server on all others.
        workers: processes of each server in plain.
        rounds: interleaved rounds of throughput and of each case of plain.
    """

    seconds: float = 60.0
    requests: int = 100_000
    soak_seconds: float = 1200.0
    threads: int = 1
    pin: bool = True
    workers: int = 1
    rounds: int = 5


def _step(name: Scenario, bundle: Path, options: Options) -> Coroutine[Any, Any, dict[str, Any]]:
    from sbs_edge.bench.serving.plain_server import against_plain

    threads, rounds = options.threads, options.rounds
    cores = split_cores() if options.pin else shared_cores()
    start: dict[Scenario, Callable[[], Coroutine[Any, Any, dict[str, Any]]]] = {
        Scenario.latency: lambda: scenarios.latency(bundle, threads),
        Scenario.throughput: lambda: scenarios.throughput(bundle, threads, min(options.seconds, 4.0), rounds),
        Scenario.drain: lambda: scenarios.drain(bundle, threads),
        Scenario.cost: lambda: scenarios.cost(bundle, threads, cores),
        Scenario.overload: lambda: overload(bundle, threads, options.seconds, cores),
        Scenario.soak: lambda: scenarios.soak(bundle, threads, options.requests, options.soak_seconds),
        Scenario.plain: lambda: against_plain(
            bundle, threads, min(options.seconds, 2.0), cores, requests_of, options.workers, rounds
        ),
    }
    return start[name]()


def _model(bundle: Path) -> dict[str, Any]:
    """Name, version, size and default target of the bundle, from its manifest."""
    opened = Bundle.open(bundle, verify=False)
    target, _ = opened.target(None)
    size = sum(path.stat().st_size for path in (bundle / target).rglob("*") if path.is_file())
    name, version = str(opened.manifest["name"]), str(opened.manifest["version"])
    return {"student": name, "version": version, "target": target, "mb": round(size / 1e6, 1)}


def measure(
    scenario: Scenario,
    bundle: Path,
    options: Options,
    document: dict[str, Any] | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Run a scenario, or all but ``plain``; return ``document``, or a new one, with the figures added."""
    document = document or new_document("serving", _model(bundle), threads=options.threads, scenarios={})
    for name in Scenario:
        if name is Scenario.plain and scenario is Scenario.all:
            continue  # it needs a package that the server does not
        if name is not Scenario.all and scenario in (name, Scenario.all):
            pinnable = name in (Scenario.overload, Scenario.plain)
            key = f"{name.value}_shared" if pinnable and not options.pin else name.value
            key += f"_{options.workers}" if name is Scenario.plain and options.workers > 1 else ""
            say(f"{key} ...")
            load = list(os.getloadavg())
            figures = run(_step(name, bundle, options))
            document["scenarios"][key] = {
                "load_average": load,
                "command": ["sbs-edge", *sys.argv[1:]],
                **figures,
            }
            say(json.dumps(figures["held"]))
    return document


def shape_to_bundle(shape: str, say: Say) -> Path:
    """Return a bundle with random weights of a shape, exported once and kept in the cache.

    Raises:
        UsageError: there is no such shape.
    """
    from sbs_edge.bench.core.shapes import shape_bundle, shape_student

    return shape_bundle(shape_student(shape, 0, say), ["cpu-int8"], say)


def gathered(path: Path, bundle: Path) -> dict[str, Any] | None:
    """Return the document in ``path`` with the bundle's figures so far; None if there is no such file.

    Raises:
        DataError: the file holds figures of another bundle or another benchmark.
    """
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if document.get("kind") != "serving" or document.get("model") != _model(bundle):
        raise DataError(f"{path} holds other figures than this bundle's serving: choose another directory.")
    return document
