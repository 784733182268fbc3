"""``sbs-edge bench long``: ways to read long inputs, and models made for them, at several lengths."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.machine import provenance
from sbs_edge.bench.core.results import new_document
from sbs_edge.bench.long.ways import WAYS, Reader
from sbs_edge.errors import UsageError
from sbs_edge.runtime.manifest import read_manifest

__all__ = ["PEERS", "measure_lengths"]

PEERS = ("led", "longt5")
FULL_ATTENTION_TOKENS = 8192
"""Longest input of full attention: at twice this length the position bias alone takes gigabytes."""


def measure_lengths(
    bundle: Path,
    lengths: Sequence[int],
    *,
    rows: int,
    calls: int = 3,
    top_k: int = 64,
    target: str | None = None,
    peers: Sequence[str] = PEERS,
    threads: int = 1,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure every way and peer at every length, each in a fresh process.

    Args:
        bundle: a bundle that reads long inputs. Accuracy is measured on the logs of ``shift-log`` if that is its task.
        lengths: tokens of the inputs.
        rows: logs behind an accuracy.
        calls: timed calls.
        top_k: states each attention head reads in the way ``top-k``.
        target: None: the default one.
        peers: of :data:`PEERS`, with random weights, for time and memory.
        threads: compute threads.
        seed: of the logs.
        say: receives a line for each measurement.

    Returns:
        The result document. Its ``records`` hold the figures of each length and way; a record without figures has the
        reason under ``failed``.

    Raises:
        UsageError: a peer is unknown, or the bundle does not read long inputs.
    """
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise UsageError(f"There is no peer {unknown[0]!r}; known are {', '.join(PEERS)}.")
    began = provenance()
    with Reader(bundle, "all states", target):  # refused here, not in the first process
        manifest = read_manifest(bundle)
    common = {"bundle": str(bundle), "threads": threads, "calls": calls, "seed": seed}
    records: list[dict[str, Any]] = []
    for tokens in lengths:
        for way in WAYS:
            say(f"{tokens:,} tokens, {way}")
            if way == "full attention" and tokens > FULL_ATTENTION_TOKENS:
                why = f"full attention is measured up to {FULL_ATTENTION_TOKENS:,} tokens, because of its memory"
                records.append({"tokens": tokens, "way": way, **_not_measured(why)})
                continue
            spec = {**common, "way": way, "tokens": tokens, "rows": rows, "top_k": top_k, "target": target}
            records.append({"tokens": tokens, "way": way, **_run(spec)})
        for peer in peers:
            say(f"{tokens:,} tokens, {peer}")
            records.append(
                {"tokens": tokens, "way": peer, **_run({**common, "peer": peer, "tokens": tokens})}
            )
    model = {"task": manifest["task"]["name"], "parameters": manifest["model"]["parameters"]}
    return new_document(
        "long", model, threads=threads, began=began, seed=seed, long=manifest["long"], rows=rows, top_k=top_k,
        records=records,
    )  # fmt: skip


def _not_measured(why: str) -> dict[str, Any]:
    return {"accuracy": None, "ms": None, "peak_mb": None, "above_loaded_mb": None, "failed": why}


def _run(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a worker's figures, or the reason why there are none."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sbs_edge.bench.long.worker"], input=json.dumps(spec), capture_output=True,
        text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": str(spec["threads"])},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return _not_measured(re.sub(r"^sbs_edge\.errors\.\w+: ", "", last)[:200])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
