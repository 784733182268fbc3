"""Train on generated rows that are never held: does memory grow with their number?

Run: python -m sbs_edge.bench.stream_rows --rows 1000000 --max-rss-mb 1500

Every row is generated, tokenised and trained on once, by a student small enough that a million rows
take minutes, not hours. Resident memory is sampled along the way; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.example import Example, Splits

__all__ = ["main", "measure", "rows", "rss_mb"]

OPTIONS: dict[str, Any] = {
    "d_model": 8, "d_ff": 16, "n_heads": 1, "n_layers": 1, "n_decoder_layers": 1, "batch_size": 500,
    "shuffle_buffer": 2000, "save_steps": 0, "trackers": (), "progress": False,
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


def measure(count: int, out: Path, samples: int = 20) -> dict[str, Any]:
    """Train one pass over ``count`` generated rows and return memory and speed."""
    from sbs_edge.student.train import train

    splits = builtin_splits("ci")
    small = Splits(splits.task, splits.train, splits.validation[:50])
    taken: list[tuple[int, float]] = []
    every = max(1, count // samples)

    def watched() -> Iterator[Example]:
        for index, example in enumerate(rows(small.train, count)):
            if index % every == 0:
                taken.append((index, round(rss_mb(), 1)))
            yield example

    started = time.perf_counter()
    steps = -(-count // int(OPTIONS["batch_size"]))
    result = train(small, out, stream=watched, max_steps=steps, **OPTIONS)
    taken.append((count, round(rss_mb(), 1)))
    seconds = time.perf_counter() - started
    # The first tenth holds start-up: buffers fill, allocators warm.
    settled = [value for index, value in taken if index >= count // 10]
    return {
        "rows": count,
        "steps": result.metrics["steps"],
        "rss_mb": taken,
        "peak_rss_mb": max(value for _, value in taken),
        "growth_after_first_tenth_mb": round(max(settled) - settled[0], 1),
        "seconds": round(seconds, 1),
        "rows_per_second": round(count / seconds, 1),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; 1 when memory passed the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--max-rss-mb", type=float, default=1500.0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options.rows, Path(folder) / "student")
    report["max_rss_mb"] = options.max_rss_mb
    sys.stdout.write(json.dumps(report) + "\n")
    return int(report["peak_rss_mb"] > options.max_rss_mb)


if __name__ == "__main__":
    sys.exit(main())
