"""``sbs-edge bench gpu``: all GPU measurements in one session, for a GPU that is available for minutes.

In order: the machine; bare matrix products at the shapes of the slices; every engine against float64; the
kernel bench in order of importance; a sweep of workspaces and tiles; the whole training step; the bundle's
GPU targets. Every stage is a process with a time limit and writes its JSON as it goes. ``result.json`` is
rewritten after each stage and can be kept as ``bench/results/<gpu>-<date>.json``. With the device ``cpu``
the same stages run on small shapes, Triton's kernels in its interpreter: this tests the session, and its
times mean nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sbs_edge import files

__all__ = ["STAGES", "passed", "run_session", "summary"]

# Stages, and the largest share of the whole time for each; time that is left goes to the next stages.
STAGES = {"matmul": 0.08, "correctness": 0.15, "kernels": 0.42, "sweep": 0.13, "train": 0.16, "targets": 0.06}
_INTERPRETED = ("correctness", "kernels", "sweep")


def _document(device: str) -> dict[str, Any]:
    from sbs_edge.bench.gpu.stages import SESSION_CASES, SMALL_CASES
    from sbs_edge.bench.kernels.bench import KernelOptions, new_document
    from sbs_edge.bench.kernels.peers import names_for

    cases = SMALL_CASES if device == "cpu" else SESSION_CASES
    options = KernelOptions(cases, names_for("all"), device=device)
    document = new_document(options)
    if device == "cpu":
        document["model"]["shape"] += " (a rehearsal: its times mean nothing)"
    return document


def _run_stage(stage: str, device: str, out: Path, seconds: float) -> str:
    """Run a stage in its own process group; return how it ended."""
    env = dict(os.environ)
    if device == "cpu" and stage in _INTERPRETED:
        env["TRITON_INTERPRET"] = "1"
    arguments = [stage, device, str(out), f"{seconds:.0f}"]
    with open(out / f"{stage}.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sbs_edge.bench.gpu.session", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"ended after its {seconds:.0f} s; what it had found is kept"
        finally:
            # Also its workers, which must not keep measuring during the next stage.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return "done"
    lines = (out / f"{stage}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"ended with {code}: {lines[-1][:300] if lines else 'it said nothing'}"


def _collect(document: dict[str, Any], out: Path, states: list[dict[str, Any]]) -> None:
    """Collect the results of the stages so far in ``document``, and write it."""
    session: dict[str, Any] = {"stages": states}
    for stage in STAGES:
        path = out / f"{stage}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        if stage == "kernels":
            for key in ("systems", "cases", "rows", "ratios", "options"):
                document[key] = found[key]
        else:
            session[stage] = found
    document["session"] = session
    files.write_json(out / "result.json", document)


def summary(document: dict[str, Any]) -> str:
    """Return the session as text, the most important part last, because a terminal or log may keep only the end."""
    from sbs_edge.bench.core.tables import headline
    from sbs_edge.bench.kernels.tables import kernel_tables

    lines: list[str] = []
    for table in reversed(kernel_tables(document)[: len(document["cases"])]):
        lines += [table.title, *("  " + " | ".join(row) for row in table.rows)]
    checks = document["session"].get("correctness", [])
    wrong = [row for row in checks if row.get("verdict") not in ("right", "left out: interpreter")]
    lines += [json.dumps(row) for row in wrong[:12]]
    lines.append(f"correctness: {len(checks)} checks, {len(wrong)} not right")
    for state in document["session"]["stages"]:
        lines.append(f"{state['stage']}: {state['state']} ({state['seconds']:.0f} s)")
    lines.append(headline(document))
    return "\n".join(lines)


def run_session(
    out: Path,
    device: str,
    minutes: float,
    only: Sequence[str] = tuple(STAGES),
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the stages within ``minutes``; return the document, which is also in ``out/result.json``.

    Args:
        out: directory for the JSON of every stage, its log, and the result.
        device: ``cuda``, or ``cpu`` for a rehearsal on small shapes.
        minutes: time for everything; a stage that is not reached gets a row that says so.
        only: the stages to run.
        say: takes a line of progress.
    """
    out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:  # an older session's figures are not this one's
        (out / f"{stage}.json").unlink(missing_ok=True)
    begun = time.monotonic()
    document = _document(device)
    states: list[dict[str, Any]] = []
    _collect(document, out, states)
    wanted = [stage for stage in STAGES if stage in only]
    spare = 0.0
    for number, stage in enumerate(wanted):
        left = 60 * minutes - (time.monotonic() - begun)
        last = number == len(wanted) - 1
        limit = left if last else min(left, 60 * minutes * STAGES[stage] + spare)
        started = time.monotonic()
        say(f"{stage}: at most {limit:.0f} s")
        state = "not reached: the time was over" if limit < 1 else _run_stage(stage, device, out, limit)
        took = time.monotonic() - started
        spare = max(0.0, limit - took)
        states.append({"stage": stage, "state": state, "seconds": took})
        say(f"{stage}: {state}")
        _collect(document, out, states)
    return document


def _stage(stage: str, device: str, out: Path, seconds: float) -> None:
    """Run a stage in its own process."""
    import torch

    from sbs_edge.bench.gpu import stages

    def save(found: Any) -> None:
        files.write_json(out / f"{stage}.json", found)

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    measure: Callable[[stages.Stage], None] = getattr(stages, stage)  # a name of STAGES
    measure(stages.Stage(torch.device(device), device == "cpu", save, say, seconds))


def passed(document: dict[str, Any]) -> bool:
    """Return whether every stage finished and no engine's result is wrong."""
    session = document["session"]
    done = all(state["state"] == "done" for state in session["stages"])
    return done and not any(row.get("verdict") == "WRONG" for row in session.get("correctness", []))


if __name__ == "__main__":  # a stage's own process
    _stage(sys.argv[1], sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
