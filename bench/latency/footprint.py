"""Cold start, memory of a fresh process, bytes on disk and installed size of each system."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.footprint import closure, directory_bytes, installed_bytes
from sbs_edge.bench.core.protocol import Worker, WorkerFailed
from sbs_edge.bench.core.results import Row
from sbs_edge.bench.core.rounds import Series, median_row, rotated
from sbs_edge.bench.latency.sections import Schedule
from sbs_edge.bench.latency.workers import Benchmark, Entry
from sbs_edge.bench.peers.system import load_module

__all__ = ["cold_start", "disk", "installed"]


def _python_floor() -> int:
    started = time.perf_counter_ns()
    subprocess.run([sys.executable, "-P", "-c", "pass"], check=True)
    return time.perf_counter_ns() - started


def _first_answer(entry: Entry, text: str, choices: list[list[str]] | None) -> tuple[int, dict[str, Any]]:
    if entry.spec is None:
        raise WorkerFailed(entry.why)
    with Worker(entry.spec) as worker:
        worker.ask("open", timeout_s=600)
        reply = worker.ask("first", texts=[text], choices=choices)
        return time.perf_counter_ns() - worker.started_ns, reply


def cold_start(
    benchmark: Benchmark, schedule: Schedule, share: float, say: Callable[[str], None]
) -> list[Row]:
    """New process to first answer (files in the page cache), and the memory that process then holds."""
    source = min(64, benchmark.inputs.max_source_tokens)
    (text,) = benchmark.inputs.texts(source, 1)
    choices = benchmark.inputs.choice_sets(1)
    times: dict[str, Series] = {"python": Series()}
    memory: dict[str, dict[str, list[float]]] = {}
    for number, _ in zip(range(schedule.cold_rounds), schedule.rounds_within(share), strict=False):
        say(f"cold start, round {number + 1}")
        times["python"].add([_python_floor()])
        for entry in rotated(benchmark.participants("cold_start"), number):
            if entry.why or entry.spec is None:
                continue
            try:
                ns, reply = _first_answer(entry, text, choices)
            except WorkerFailed as failure:
                entry.give_up(f"cold start: {failure}")
                continue
            times.setdefault(entry.name, Series()).add([ns])
            for name in ("peak_rss_mb", "anonymous_rss_mb"):
                if name in reply:
                    memory.setdefault(entry.name, {}).setdefault(name, []).append(reply[name])
    case = f"first answer, {source} tokens"
    rows = [
        series.row("cold_start", name, "", case if name != "python" else "interpreter alone")
        for name, series in times.items()
        if series.rounds
    ]
    names = {"peak_rss_mb": "peak RSS (VmHWM)", "anonymous_rss_mb": "anonymous RSS"}
    for system, found in memory.items():
        rows += [
            median_row("memory", system, names[name], case, "MB", values) for name, values in found.items()
        ]
    return rows


def _bundle_sizes(bundle: Path, target: str) -> dict[str, float]:
    """Bytes for the label alone (graph, its data, tokenizer, manifest) and for the whole target."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    sizes = {name: float(entry["bytes"]) for name, entry in manifest["files"].items()}
    own = (bundle / "manifest.json").stat().st_size
    shared = sum(
        size
        for name, size in sizes.items()
        if name in ("tokenizer.json", "config.json", "generation_config.json")
    )
    target_files = {name: size for name, size in sizes.items() if name.split("/")[0] == target}
    graph = str(manifest["targets"][target].get("label_scorer") or "")
    found = {"all of the target": own + shared + sum(target_files.values())}
    if graph and not {"explainer", "decoder_step"} & set(manifest["targets"][target]):
        return {"label alone": found["all of the target"]}
    if graph:
        needed = {graph} | _external_data(bundle, graph, set(target_files))
        found["label alone"] = own + shared + sum(size for name, size in sizes.items() if name in needed)
    return found


def _external_data(bundle: Path, graph: str, among: set[str]) -> set[str]:
    """Files of external weights that a graph names; their names stand in it as plain strings."""
    content = (bundle / graph).read_bytes()
    return {name for name in among if name != graph and Path(name).name.encode() in content}


def disk(benchmark: Benchmark) -> list[Row]:
    """Bytes on disk of what each system loads."""
    rows = []
    for entry in benchmark.entries:
        if entry.spec is None:
            continue
        if entry.ours:
            sizes = _bundle_sizes(Path(entry.spec.artifact), entry.spec.system.partition(":")[2])
        elif entry.facts.get("in_place"):
            folder = Path(entry.spec.student)
            sizes = {"all of it": float(sum((folder / name).stat().st_size for name in entry.facts["files"]))}
        else:
            # The tokenizer lies in the student directory and is needed too.
            tokenizer = (Path(entry.spec.student) / "tokenizer.json").stat().st_size
            sizes = {"all of it": float(directory_bytes(Path(entry.spec.artifact)) + tokenizer)}
        rows += [
            Row("disk", entry.name, variant, "files", "MB", "lower", size / 1e6)
            for variant, size in sizes.items()
        ]
    return rows


def installed(benchmark: Benchmark) -> list[Row]:
    """Size of the installed distributions each system needs at run time, with all they require."""
    rows = []
    for entry in benchmark.entries:
        if entry.spec is None:
            continue
        sizes = installed_bytes(closure(load_module(entry.spec.system).ROOTS))
        largest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:5])
        extra = {
            "distributions": len(sizes),
            "largest_mb": {name: round(size / 1e6, 1) for name, size in largest.items()},
        }
        rows.append(
            Row(
                "installed", entry.name, "", "packages", "MB", "lower", sum(sizes.values()) / 1e6, extra=extra
            )
        )
    return rows
