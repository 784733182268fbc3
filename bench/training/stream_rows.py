"""``sbs-edge bench stream-rows``: does memory grow with the number of rows in streamed training?

Every generated row is tokenized and trained on once, on the path of ``train --stream``, by a student small
enough that a million rows take minutes (about 0.4 ms of one core a row, half of it tokenizing). Resident
memory is sampled along the way. A straight line is fitted to the samples: its slope shows memory that
grows with rows.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.footprint import memory_mb
from sbs_edge.bench.core.results import new_document
from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.example import Example, Splits

__all__ = ["measure", "rows", "slope_mb"]

OPTIONS: dict[str, Any] = {
    "d_model": 8, "d_ff": 16, "n_heads": 1, "n_layers": 1, "n_decoder_layers": 1, "batch_size": 500,
    "shuffle_buffer": 2000, "save_steps": 0, "trackers": (), "progress": False, "threads": 1,
}  # fmt: skip


def rows(base: list[Example], count: int) -> Iterator[Example]:
    """Generate ``count`` rows, all different, from the sentences of ``base``."""
    rng = random.Random(0)
    for index in range(count):
        example = rng.choice(base)
        yield Example(f"g{index}", f"{example.input} ticket {index}", example.label, None, example.rationale)


def slope_mb(taken: list[tuple[int, float]]) -> float:
    """Return the least-squares growth of (row, MiB) samples, in MiB a million rows."""
    places, values = zip(*taken, strict=True)
    return 1e6 * statistics.linear_regression(places, values).slope if len(set(places)) > 1 else 0.0


def measure(count: int, out: Path, samples: int = 100, max_rss_mb: float = 1500.0) -> dict[str, Any]:
    """Train one pass over ``count`` generated rows and return memory and speed."""
    from sbs_edge.training.train import train

    splits = builtin_splits("ci")
    small = Splits(splits.task, splits.train, splits.validation[:50])
    taken: list[tuple[int, float]] = []
    every = max(1, count // samples)

    def watched() -> Iterator[Example]:
        for index, example in enumerate(rows(small.train, count)):
            if index % every == 0:
                taken.append((index, _rss_mb()))
            yield example

    started, cpu = time.perf_counter(), time.process_time()
    steps = -(-count // int(OPTIONS["batch_size"]))
    result = train(small, out, stream=watched, max_steps=steps, **OPTIONS)
    taken.append((count, _rss_mb()))
    seconds = time.perf_counter() - started
    # The first tenth holds start-up: buffers fill, allocators warm.
    settled = [(index, value) for index, value in taken if index >= count // 10]
    return new_document(
        "stream-rows",
        {"shape": "smallest student", "random_weights": True},
        threads=OPTIONS["threads"],
        rows=count,
        steps=result.metrics["steps"],
        rss_mb=taken,
        peak_rss_mb=max(value for _, value in taken),
        growth_after_first_tenth_mb=round(max(value for _, value in settled) - settled[0][1], 1),
        slope_after_first_tenth_mb_per_million_rows=round(slope_mb(settled), 2),
        seconds=round(seconds, 1),
        cpu_seconds=round(time.process_time() - cpu, 1),
        rows_per_second=round(count / seconds, 1),
        max_rss_mb=max_rss_mb,
    )


def _rss_mb() -> float:
    """Return this process's resident memory in MiB."""
    return round(memory_mb()["rss_mb"] * 1e6 / 2**20, 1)
