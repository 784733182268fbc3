"""Figures of the server: latency, throughput, drain, cost, overload and soak, over loopback.

    python -m sbs_edge.bench.serving.bench all BUNDLE --out serving.json
    python -m sbs_edge.bench.serving.bench overload BUNDLE --seconds 60
    python -m sbs_edge.bench.serving.bench overload --shape t5-small
    python -P -m sbs_edge.bench.serving.bench plain BUNDLE --workers 2 --no-pin

Drain and soak ask for hundreds of rationales: they suit bundles of a few million parameters, the other
scenarios any.

Every scenario starts a server of its own, is bounded in time and in requests, and stops what it
started. The last line on stdout is one JSON document; with ``--out`` scenarios run one after another
are gathered in one file. Knows nothing of the server's insides.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sbs_edge import files
from sbs_edge.bench.core import machine
from sbs_edge.bench.serving import scenarios
from sbs_edge.bench.serving.client import run
from sbs_edge.bench.serving.server import shared_cores, split_cores
from sbs_edge.errors import DataError, UsageError
from sbs_edge.runtime.bundle import Bundle

__all__ = ["Options", "Scenario", "main", "measure"]

_console = Console(stderr=True)


class Scenario(StrEnum):
    """What to measure."""

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
    """How to measure.

    Args:
        seconds: length of the overload; the other phases are at most as long.
        requests: requests of the soak.
        soak_seconds: longest time of the soak; what is not sent by then is reported as not sent.
        threads: threads of one inference, served and in-process.
        pin: in overload, cost and plain, the client on the last processor and the server on all others.
        workers: processes of the server in plain.
    """

    seconds: float = 60.0
    requests: int = 100_000
    soak_seconds: float = 1200.0
    threads: int = 1
    pin: bool = True
    workers: int = 1


def _step(name: Scenario, bundle: Path, options: Options) -> Coroutine[Any, Any, dict[str, Any]]:
    threads = options.threads
    cores = split_cores() if options.pin else shared_cores()
    if name is Scenario.latency:
        return scenarios.latency(bundle, threads)
    if name is Scenario.throughput:
        return scenarios.throughput(bundle, threads, min(options.seconds, 4.0))
    if name is Scenario.drain:
        return scenarios.drain(bundle, threads)
    if name is Scenario.cost:
        return scenarios.cost(bundle, threads, cores)
    if name is Scenario.overload:
        return scenarios.overload(bundle, threads, options.seconds, cores)
    if name is Scenario.plain:
        from sbs_edge.bench.serving.plain_server import against_plain

        return against_plain(
            bundle, threads, min(options.seconds, 2.0), cores, scenarios.requests_of, options.workers
        )
    return scenarios.soak(bundle, threads, options.requests, options.soak_seconds)


def _model(bundle: Path) -> dict[str, Any]:
    """What was served: name, version, size and default target, from the manifest."""
    opened = Bundle.open(bundle, verify=False)
    target, _ = opened.target(None)
    size = sum(path.stat().st_size for path in (bundle / target).rglob("*") if path.is_file())
    name, version = str(opened.manifest["name"]), str(opened.manifest["version"])
    return {"student": name, "version": version, "target": target, "mb": round(size / 1e6, 1)}


def measure(
    scenario: Scenario, bundle: Path, options: Options, document: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run one scenario or all; return the document, ``document`` with the new figures if one is given."""
    document = document or {
        "format": 1,
        "kind": "serving",
        **machine.provenance(["python", "-m", "sbs_edge.bench.serving.bench", *sys.argv[1:]]),
        "model": _model(bundle),
        "seed": 0,
        "threads": options.threads,
        "cpus": sorted(os.sched_getaffinity(0)),
        "scenarios": {},
    }
    for name in Scenario:
        if name is Scenario.plain and scenario is Scenario.all:
            continue  # needs a package that the server does without
        if name is not Scenario.all and scenario in (name, Scenario.all):
            pinnable = name in (Scenario.overload, Scenario.plain)
            key = f"{name.value}_shared" if pinnable and not options.pin else name.value
            key += f"_{options.workers}" if name is Scenario.plain and options.workers > 1 else ""
            _console.print(f"{key} ...", highlight=False)
            load = list(os.getloadavg())
            figures = run(_step(name, bundle, options))
            document["scenarios"][key] = {"load_average": load, **figures}
            _console.print_json(data=figures["held"])
    return document


def _served(bundle: Path | None, shape: str) -> Path:
    if (bundle is None) == (not shape):
        raise UsageError("Give either a bundle or --shape.")
    if bundle is not None:
        return bundle
    from sbs_edge.bench.latency.bench import shape_bundle, shape_student

    return shape_bundle(shape_student(shape, 0, _console.print), ["cpu-int8"], _console.print)


def _gathered(out: Path, bundle: Path) -> dict[str, Any] | None:
    """Return the document ``out`` already holds, if it is of the same bundle."""
    if not out.exists():
        return None
    document: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if document.get("kind") != "serving" or document.get("model") != _model(bundle):
        raise DataError(f"{out} holds other figures than this bundle's serving; give another --out.")
    return document


def main(
    scenario: Annotated[Scenario, typer.Argument(help="What to measure.")],
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle with a closed label set and rationales.")
    ] = None,
    shape: Annotated[
        str,
        typer.Option(help="Instead of a bundle: random weights of this shape, made once (t5-small, ...)."),
    ] = "",
    seconds: Annotated[float, typer.Option(help="Length of the overload.")] = 60.0,
    requests: Annotated[int, typer.Option(help="Requests of the soak.")] = 100_000,
    soak_seconds: Annotated[float, typer.Option(help="Longest time of the soak.")] = 1200.0,
    threads: Annotated[int, typer.Option(help="Threads of one inference, served and in-process.")] = 1,
    pin: Annotated[
        bool, typer.Option(help="Overload and cost: client and server on processors of their own.")
    ] = True,
    workers: Annotated[int, typer.Option(help="Processes of each server in plain.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Gather the figures in this file.")] = None,
) -> None:
    """Measure the server over loopback; the last line is JSON. Exit 1 if a figure was missed."""
    if threads == 1:  # the same single thread for the tokenizer, here and in the server
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options = Options(seconds, requests, soak_seconds, threads, pin, workers)
    bundle = _served(bundle, shape)
    document = measure(scenario, bundle, options, _gathered(out, bundle) if out else None)
    if out:
        files.write_json(out, document)
    sys.stdout.write(files.to_json(document) + "\n")
    if not all(ok for part in document["scenarios"].values() for ok in part["held"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
