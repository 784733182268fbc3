"""``sbs-edge bench scale``: offline scoring by one worker, two workers and a plain loop, on the same rows.

The variants score one file of JSON Lines with one bundle:

``loop``   the same reading, answering and writing in this process, unit by unit, without Ray;
``ray-1``  one actor; its excess over ``loop`` is Ray's overhead (the aim is under 10 %);
``ray-2``  two actors; ``ray-1`` over ``ray-2`` is the scaling.

The variants run in turn, each in a fresh process that gives one thread to a student. For Ray three times are kept
apart: its own start, the whole call after that, and the steady part from the first unit's start to the
last one's end (without loading students). The outputs of all variants are compared byte by byte. Accuracy
plays no part: without a bundle, a student of the built-in task after one training step scores the rows.
"""

from __future__ import annotations

import json
import platform
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.protocol import Worker
from sbs_edge.bench.core.results import new_document
from sbs_edge.bench.core.worker import Answer, serve
from sbs_edge.bench.peers.system import Spec
from sbs_edge.resources import usable_cpus

__all__ = ["make_bundle", "measure", "write_rows"]


def write_rows(path: Path, n_rows: int, seed: int = 0) -> Path:
    """Write ``n_rows`` tickets of the built-in task as JSON Lines; texts repeat after 1300 rows."""
    from sbs_edge.data.builtin import builtin_splits

    splits = builtin_splits("default", seed=seed)
    texts = [row.input for row in (*splits.test, *splits.validation)]
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as handle:
        for number in range(n_rows):
            text = texts[rng.randrange(len(texts))]
            handle.write(json.dumps({"id": f"row-{number}", "input": text}) + "\n")
    return path


def make_bundle(folder: Path) -> Path:
    """Export a student of the built-in task after one step of training: its speed is that of a trained one."""
    from sbs_edge.export.api import export
    from sbs_edge.training.train import train

    student = folder / "student"
    train(
        "builtin", student, max_steps=1, batch_size=1, validation_rows=0, max_source_tokens=128,
        max_target_tokens=32, trackers=(), progress=False,
    )  # fmt: skip
    export(student, folder / "bundle", targets=("cpu-int8",), max_drop=100, min_rationale_agreement=0.0)
    return folder / "bundle"


def _loop(bundle: Path, data: Path, out: Path, shard_bytes: int) -> dict[str, float]:
    from sbs_edge.runtime.student import Student
    from sbs_edge.scale.predict import answer_rows
    from sbs_edge.scale.units import plan_units, read_unit, shard_name, write_shard

    out.mkdir()
    whole = time.perf_counter()
    with Student.load(bundle, threads=1) as student:
        started, cpu = time.perf_counter(), time.process_time()
        for unit in plan_units(str(data), shard_bytes):
            rows = list(read_unit(unit))
            write_shard(str(out), shard_name(unit, "jsonl"), answer_rows(student, rows))
        ended = time.perf_counter()
        return {
            "seconds": round(ended - whole, 3),
            "steady_seconds": round(ended - started, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
        }


def _ray(bundle: Path, data: Path, out: Path, shard_bytes: int, workers: int) -> dict[str, float]:
    from sbs_edge.scale.predict import predict_with_ray
    from sbs_edge.scale.run import session

    started = time.perf_counter()
    with session(None, workers, 1.0):
        up = time.perf_counter()
        totals = predict_with_ray(bundle, str(data), out, workers=workers, shard_bytes=shard_bytes)
        return {
            "start_ray_seconds": round(up - started, 3),
            "seconds": round(time.perf_counter() - up, 3),
            "steady_seconds": totals["steady_seconds"],
            "busy_seconds": totals["busy_seconds"],
        }


def _variant(spec: Spec) -> Answer:
    """Return what answers for one variant in its own process."""
    bundle, given = Path(spec.artifact), spec.options
    data, out, shard_bytes = Path(given["data"]), Path(given["out"]), int(given["shard_bytes"])

    def answer(order: dict[str, Any]) -> dict[str, Any]:
        if order["do"] == "open":
            return {}
        if spec.system == "loop":
            return dict(_loop(bundle, data, out, shard_bytes))
        return dict(_ray(bundle, data, out, shard_bytes, int(spec.system.removeprefix("ray-"))))

    return answer


def _run_variant(variant: str, bundle: Path, **places: Any) -> dict[str, float]:
    """Run one variant in a process of its own."""
    options = {name: str(value) for name, value in places.items()}
    with Worker(Spec(variant, str(bundle), "", options=options), "sbs_edge.bench.scale.bench") as worker:
        worker.ask("open")
        return worker.ask("score", timeout_s=86_400)


def _content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("part-*")))


def measure(
    n_rows: int, *, bundle: Path | None = None, rounds: int = 1, shard_rows: int = 5000
) -> dict[str, Any]:
    """Run all variants ``rounds`` times, interleaved; return medians and everything they came from."""
    folder = Path(tempfile.mkdtemp(prefix="sbs-edge-scale-"))
    try:
        chosen = bundle or make_bundle(folder / "made")
        data = write_rows(folder / "rows.jsonl", n_rows)
        shard_bytes = max(1, data.stat().st_size * shard_rows // n_rows)
        taken: dict[str, list[Any]] = {"loop": [], "ray-1": [], "ray-2": []}
        contents = set()
        for number in range(rounds):
            for variant, figures in taken.items():
                out = folder / f"{variant}-{number}"
                figures.append(_run_variant(variant, chosen, data=data, out=out, shard_bytes=shard_bytes))
                contents.add(_content(out))
                shutil.rmtree(out)
        median, steady = (
            {variant: statistics.median(f[name] for f in figures) for variant, figures in taken.items()}
            for name in ("seconds", "steady_seconds")
        )
        return new_document(
            "scale",
            {"student": chosen.name if bundle else "student of the built-in task after one training step"},
            threads=1,
            rows=n_rows,
            rounds=rounds,
            shard_bytes=shard_bytes,
            cores=usable_cpus(),
            python=platform.python_version(),
            seconds=median,
            steady_seconds=steady,
            steady_overhead=round(steady["ray-1"] / steady["loop"] - 1, 4),
            steady_scaling_1_to_2=round(steady["ray-1"] / steady["ray-2"], 3),
            rows_per_second={variant: round(n_rows / s, 1) for variant, s in median.items()},
            ray_overhead=round(median["ray-1"] / median["loop"] - 1, 4),
            scaling_1_to_2=round(median["ray-1"] / median["ray-2"], 3),
            outputs_equal=len(contents) == 1,
            raw=taken,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":  # a variant's own process
    serve(_variant)
