"""Call a function for many orders in a few processes of this machine; a process that dies costs its own order only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

__all__ = ["TICK_S", "run_in_processes"]

TICK_S = 0.5
"""Seconds after which the caller is given a turn although no order has finished."""

Function = Callable[[dict[str, Any]], dict[str, Any]]


def run_in_processes(
    function: Function, orders: Sequence[dict[str, Any]], processes: int, log: Path
) -> Iterator[tuple[int, dict[str, Any]] | None]:
    """Yield (index, result) of each order as it finishes, and None at least every :data:`TICK_S` seconds.

    The processes end with the generator, and with this process, however it ends. They start without what this
    process has imported (spawn), so that a library which dislikes forks is safe.

    Args:
        function: importable; called once for each order. An exception of it ends the process.
        orders: plain values.
        processes: at most this many at once.
        log: file that receives what the processes write to stderr.

    Returns:
        Results of ``function``. Where its process died: ``failed``, a sentence, and ``exit_code`` 1.

    """
    waiting = deque(enumerate(orders))
    idle: list[_Worker] = []
    busy: dict[Any, tuple[_Worker, int]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < processes:
                idle = [worker for worker in idle if worker.process.is_alive()]
                worker = idle.pop() if idle else _Worker(function, log)
                index, order = waiting.popleft()
                worker.pipe.send(order)
                busy[worker.pipe] = (worker, index)
            for pipe in wait(list(busy), timeout=TICK_S):
                worker, index = busy.pop(pipe)
                try:
                    result = worker.pipe.recv()
                    idle.append(worker)
                except (EOFError, ConnectionResetError):
                    result = {"failed": worker.cause_of_death(), "exit_code": 1}
                yield index, result
            yield None
    finally:
        for worker in [*idle, *(each for each, _ in busy.values())]:
            worker.stop()


class _Worker:
    """A process that waits for orders."""

    def __init__(self, function: Function, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function, str(log)), daemon=True)
        self.process.start()
        theirs.close()

    def cause_of_death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            hint = ", often for lack of memory" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{hint}"
        return f"its process ended with exit code {code}"

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.pipe.close()


def _serve(pipe: Any, function: Function, log: str) -> None:
    """Answer orders until the pipe closes."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of a terminal; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "a", encoding="utf-8") as handle:
        os.dup2(handle.fileno(), 2)
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        pipe.send(function(order))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
