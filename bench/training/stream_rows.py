"""Train on generated rows that are never held: does memory grow with their number?

Run: python -m sbs_edge.bench.training.stream_rows --rows 1000000 --max-rss-mb 1500

Every row is generated, tokenised and trained on once, on the path of ``train --stream``, by a student
small enough that a million rows take minutes, not hours (about 0.4 ms of one core a row, of which
tokenising is half). Resident memory is sampled along the way. The last line is one JSON document, with
the slope of a straight line through the samples: memory that grew with rows would show there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.example import Example, Splits

__all__ = ["main", "measure", "rows", "rss_mb", "slope_mb"]

OPTIONS: dict[str, Any] = {
    "d_model": 8, "d_ff": 16, "n_heads": 1, "n_layers": 1, "n_decoder_layers": 1, "batch_size": 500,
    "shuffle_buffer": 2000, "save_steps": 0, "trackers": (), "progress": False, "threads": 1,
}  # fmt: skip


def rss_mb() -> float:
    """Return this process's resident memory in MiB (Linux)."""
    with open("/proc/self/statm", encoding="ascii") as handle:
        return int(handle.read().split()[1]) * 4096 / 2**20


def rows(base: list[Example], count: int) -> Iterator[Example]:
    """Generate ``count`` rows, each unlike every other, from the sentences of ``base``."""
    rng = random.Random(0)
    for index in range(count):
        example = rng.choice(base)
        yield Example(f"g{index}", f"{example.input} ticket {index}", example.label, None, example.rationale)


def slope_mb(taken: list[tuple[int, float]]) -> float:
    """Return the least-squares growth of (row, MiB) samples, in MiB a million rows."""
    middle_x = sum(x for x, _ in taken) / len(taken)
    middle_y = sum(y for _, y in taken) / len(taken)
    spread = sum((x - middle_x) ** 2 for x, _ in taken)
    return 1e6 * sum((x - middle_x) * (y - middle_y) for x, y in taken) / spread if spread else 0.0


def measure(count: int, out: Path, samples: int = 100) -> dict[str, Any]:
    """Train one pass over ``count`` generated rows and return memory and speed."""
    from sbs_edge.training.train import train

    splits = builtin_splits("ci")
    small = Splits(splits.task, splits.train, splits.validation[:50])
    taken: list[tuple[int, float]] = []
    every = max(1, count // samples)

    def watched() -> Iterator[Example]:
        for index, example in enumerate(rows(small.train, count)):
            if index % every == 0:
                taken.append((index, round(rss_mb(), 1)))
            yield example

    started, cpu = time.perf_counter(), time.process_time()
    steps = -(-count // int(OPTIONS["batch_size"]))
    result = train(small, out, stream=watched, max_steps=steps, **OPTIONS)
    taken.append((count, round(rss_mb(), 1)))
    seconds = time.perf_counter() - started
    # The first tenth holds start-up: buffers fill, allocators warm.
    settled = [(index, value) for index, value in taken if index >= count // 10]
    return {
        "kind": "stream-rows",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": count,
        "steps": result.metrics["steps"],
        "rss_mb": taken,
        "peak_rss_mb": max(value for _, value in taken),
        "growth_after_first_tenth_mb": round(max(value for _, value in settled) - settled[0][1], 1),
        "slope_after_first_tenth_mb_per_million_rows": round(slope_mb(settled), 2),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "rows_per_second": round(count / seconds, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 1 when memory passed the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--max-rss-mb", type=float, default=1500.0)
    parser.add_argument("--out", type=Path, help="Write the document here too.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options.rows, Path(folder) / "student")
    report["max_rss_mb"] = options.max_rss_mb
    if options.out is not None:
        files.write_json(options.out, report)
    sys.stdout.write(json.dumps(report) + "\n")
    return int(report["peak_rss_mb"] > options.max_rss_mb)


if __name__ == "__main__":
    sys.exit(main())
