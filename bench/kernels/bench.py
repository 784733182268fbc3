"""``sbs-edge bench kernels``: the fused loss and its peers, every case in interleaved rounds.

All losses of a case share one process and run in turn (A B C, then B C A, ...). A loss that ends the
process or leaves its device unusable becomes a row with the reason, and the others continue in a new process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sbs_edge.bench.core import results
from sbs_edge.bench.core.protocol import Worker, WorkerFailed
from sbs_edge.bench.core.rounds import rotated
from sbs_edge.bench.kernels.case import CaseRecord, Entry, state
from sbs_edge.bench.kernels.cases import Case
from sbs_edge.bench.kernels.peers import OURS, PEERS
from sbs_edge.bench.kernels.reference_error import judge
from sbs_edge.bench.peers.system import Spec
from sbs_edge.errors import UsageError

__all__ = ["KernelOptions", "measure_kernels", "new_document"]

Say = Callable[[str], None]
Save = Callable[[dict[str, Any]], None]
Start = Callable[[Spec], Any]
_MODULE = "sbs_edge.bench.kernels.worker"
_NOT_REACHED = "not reached: the time was over"


@dataclass(slots=True)
class KernelOptions:
    """Conditions of the kernel bench.

    Attributes:
        cases: in order of importance; cases that the time does not allow become rows that say so.
        peers: names of :data:`~sbs_edge.bench.kernels.peers.PEERS`.
        device: ``cpu`` or ``cuda``.
        rounds: interleaved rounds of every case at most; at least three are run.
        calls: timed calls of each loss in a round.
        minutes: time for everything.
        threads: compute threads.
        seed: of the inputs.
        student: the student behind the data kind ``student``.
        prepare_s: limit on the first call of one loss, compiling included.
        slow_cases: losses that compile for most of a minute take part in this many of the first cases.
        graph_cases: steps are also captured in a CUDA graph and replayed in this many of the first cases;
            none where the device is a CPU.
    """

    cases: list[Case]
    peers: tuple[str, ...]
    device: str = "cpu"
    rounds: int = 10
    calls: int = 1
    minutes: float = 30.0
    threads: int = 1
    seed: int = 0
    student: Path | None = None
    prepare_s: float = 300.0
    slow_cases: int | None = None
    graph_cases: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the plain form for JSON."""
        return {
            **asdict(self),
            "peers": list(self.peers),
            "student": str(self.student) if self.student else None,
        }


def _start(spec: Spec) -> Worker:
    return Worker(spec, _MODULE)


class _Losses:
    """The process that holds a case's losses; started again without the one that ended it."""

    def __init__(self, spec: Spec, record: CaseRecord, start: Start, prepare_s: float) -> None:
        self.spec, self.record, self.start, self.prepare_s = spec, record, start, prepare_s
        self.worker: Any = None
        self.ready: list[Entry] = []

    def open(self, truth: bool = True) -> dict[str, Any]:
        self.worker = self.start(self.spec)
        reply: dict[str, Any] = self.worker.ask("open", timeout_s=600, truth=truth)
        return reply

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()

    def ask(self, entry: Entry, do: str, timeout_s: float = 300.0, **order: Any) -> dict[str, Any] | None:
        """The worker's answer, or None where it failed: then ``entry`` has its reason."""
        asked = {"peer": entry.peer, "variant": entry.variant, **order}
        try:
            reply: dict[str, Any] = self.worker.ask(do, timeout_s=timeout_s, **asked)
            return reply
        except WorkerFailed as failure:
            self.record.fail(entry, str(failure))
            if entry in self.ready:
                self.ready.remove(entry)
            if not self.worker.alive or _unusable(str(failure)):
                self.again()
            return None

    def prepare(self, entry: Entry, check: bool) -> dict[str, Any] | None:
        reply = self.ask(entry, "prepare", self.prepare_s, check=check)
        if reply is not None and entry not in self.ready:
            self.ready.append(entry)
        return reply

    def again(self) -> None:
        """Go on in a new process with every loss that is ready."""
        self.close()
        self.open(truth=False)
        for entry in list(self.ready):
            self.prepare(entry, check=False)


def _unusable(reason: str) -> bool:
    """Return whether a device error has made the device unusable for the whole process."""
    broken = any(word in reason for word in ("CUDA error", "cudaError", "CUDA driver error"))
    return broken and "out of memory" not in reason.lower()


def _spec(options: KernelOptions, case: Case) -> Spec:
    given = {
        "case": case.as_dict(),
        "device": options.device,
        "seed": options.seed,
        "student": str(options.student) if options.student else None,
    }
    allowed = sorted(os.sched_getaffinity(0))
    cpus = allowed[-options.threads :] if options.device == "cpu" else allowed
    return Spec("kernels", "", "", threads=options.threads, cpus=cpus, options=given)


def _timed_rounds(losses: _Losses, record: CaseRecord, options: KernelOptions, end: float) -> None:
    for number in range(options.rounds):
        if number >= 3 and time.monotonic() > end:
            break
        try:
            record.roofs.append(losses.worker.ask("roof", repeats=1 if options.device == "cpu" else 3))
        except WorkerFailed as failure:
            record.roof_failure = str(failure)
        for entry in rotated(losses.ready, number):
            if entry not in losses.ready:  # lost when the process was started again
                continue
            for what in ("forward", "step"):
                series = record.series(entry, what)
                # The first call already ran: one more warms what a compiler put off.
                warm = series.warm if number == 0 or options.device == "cuda" else 0
                reply = losses.ask(entry, "time", what=what, calls=options.calls, warm=warm)
                if reply is None:
                    break
                series.add([int(ms * 1e6) for ms in reply["ms"]])
                record.host[(entry, what)] = min(reply["host_ms"])


def _graph_rounds(losses: _Losses, record: CaseRecord, options: KernelOptions, end: float) -> None:
    """Replay captured steps in turn; a step that cannot be captured keeps its other figures."""
    for number in range(3):
        for entry in rotated(losses.ready, number):
            if entry in record.graph_failures or entry not in losses.ready:
                continue
            if time.monotonic() > end and number == 0 and not entry.peer.startswith(OURS):
                record.graph_failures[entry] = _NOT_REACHED
                continue
            try:
                reply = losses.worker.ask(
                    "graph", timeout_s=300.0, peer=entry.peer, variant=entry.variant, calls=options.calls
                )
            except WorkerFailed as failure:
                record.graph_failures[entry] = str(failure)
                record.times.pop((entry, "graph"), None)
                # Whatever was recorded on the device when a capture broke off: a new process has none of it.
                losses.again()
                continue
            record.series(entry, "graph").add([int(ms * 1e6) for ms in reply["ms"]])
            record.host[(entry, "graph")] = min(reply["host_ms"])


def _memory(losses: _Losses, record: CaseRecord, options: KernelOptions) -> None:
    for entry in list(losses.ready):
        if entry not in losses.ready:
            continue
        if options.device == "cuda":
            reply = losses.ask(entry, "memory")
        else:
            worker = losses.start(losses.spec)
            try:
                worker.ask("open", timeout_s=600, truth=False)
                reply = worker.ask("memory", peer=entry.peer, variant=entry.variant)
            except WorkerFailed as failure:
                record.memory_failures[entry] = str(failure)
                reply = None
            finally:
                worker.close()
        if reply is not None:
            record.memory[entry] = reply


def _case(
    options: KernelOptions, case: Case, end: float, start: Start, say: Say, slow: bool, graph: bool
) -> CaseRecord:
    record = CaseRecord(case, options.device)
    losses = _Losses(_spec(options, case), record, start, options.prepare_s)
    # What compiles for long comes last: it shall not take the others' time.
    peers = sorted(options.peers, key=lambda name: PEERS[name].slow_start)
    entries = [Entry(peer, variant) for peer in peers for variant in case.variants]
    try:
        try:
            record.facts = losses.open()
        except WorkerFailed as failure:
            for entry in entries:
                record.fail(entry, f"the case could not be set up: {failure}")
            return record
        for entry in entries:
            if time.monotonic() > end and not entry.peer.startswith(OURS):
                record.fail(entry, _NOT_REACHED)
                continue
            if PEERS[entry.peer].slow_start and not slow:
                record.fail(entry, "left out: it compiles for too long to be in every case")
                continue
            say(f"{case.name}: {entry.name}")
            reply = losses.prepare(entry, check=True)
            if reply is None:
                say(f"{case.name}: {entry.name}: {record.failures[entry]}")
                continue
            record.first_ms[entry] = reply["first_ms"]
            if "errors" in reply:
                record.errors[entry] = reply["errors"]
                why = judge(reply["errors"], record.facts["plain"], record.facts["epsilon"])
                if why is not None:
                    record.wrong[entry] = why
        say(f"{case.name}: {len(losses.ready)} losses in turn")
        _timed_rounds(losses, record, options, end)
        _memory(losses, record, options)
        if graph:
            say(f"{case.name}: captured steps in turn")
            _graph_rounds(losses, record, options, end)
    except WorkerFailed as failure:  # the process could not be started again
        for entry in losses.ready:
            record.fail(entry, str(failure))
    finally:
        losses.close()
    return record


def new_document(options: KernelOptions, command: list[str] | None = None) -> dict[str, Any]:
    """A document without a measurement."""
    model = {"shape": f"linear + cross-entropy on {options.device}"}
    return results.new_document(
        "kernels", model, threads=options.threads, cpus=sorted(os.sched_getaffinity(0))[-options.threads :],
        command=command, seed=options.seed, options=options.as_dict(), systems=[], cases=[], rows=[], ratios=[],
    )  # fmt: skip


def measure_kernels(
    options: KernelOptions,
    say: Say = lambda _: None,
    command: list[str] | None = None,
    save: Save = lambda _: None,
    start: Start = _start,
) -> dict[str, Any]:
    """Run the bench; return its document (see :mod:`sbs_edge.bench.core.results`).

    Args:
        options: what to measure.
        say: takes a line of progress.
        command: what was run, for the provenance.
        save: takes the unfinished document after every case, so that a crash loses at most one.
        start: starts a worker; tests give one of their own.

    Raises:
        UsageError: no case, no peer, or a peer that does not exist.
    """
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown or not options.peers or not options.cases:
        raise UsageError(
            f"There is nothing to measure, or an unknown peer: {', '.join(unknown) or 'none given'}."
        )
    document = new_document(options, command)
    deadline = time.monotonic() + 60.0 * options.minutes
    for number, case in enumerate(options.cases):
        left = deadline - time.monotonic()
        if left <= 0:
            document["systems"].append(state("every loss", case.name, "", "failed", _NOT_REACHED))
            continue
        # The first cases matter most: each may take a quarter of what is left, however many follow.
        end = time.monotonic() + left / min(len(options.cases) - number, 4)
        slow = options.slow_cases is None or number < options.slow_cases
        graph = options.device == "cuda" and (options.graph_cases is None or number < options.graph_cases)
        record = _case(options, case, end, start, say, slow, graph)
        record.write(document)
        save(document)
    return document
