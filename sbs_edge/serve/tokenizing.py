"""Tokenise on a thread beside the event loop, shared fairly between requests by characters.

The texts of a request are divided into slices. A slice has a deadline, counted in characters read: those that had been
read when it came, plus a multiple of its own. The nearest deadline goes first, so a short request overtakes long ones
and the rest of a long one, and none waits forever.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from sbs_edge.serve.process_settings import lower_thread_priority

__all__ = ["FairTokenizer"]

Tokenize = Callable[[Sequence[str], str], list[list[int]]]

_SLICE_CHARACTERS = 4096  # a few milliseconds
# Only long requests are tokenised here. The event loop and the inference of short ones come first on a busy core.
_NICE = 5
_PATIENCE = 8  # a slice is overtaken by shorter ones until so many times its own characters have been read


@dataclass(slots=True)
class _Job:
    """The texts of a request for one task."""

    tokenize: Tokenize
    task: str
    texts: Sequence[str]
    most: int  # characters read of a text at most
    done: asyncio.Future[list[list[int]]]
    left: int  # characters that are still to be read
    rows: list[list[int]] = field(default_factory=list)

    def cost(self, text: str) -> int:
        return min(len(text), self.most) + 1

    def next_slice(self) -> tuple[Sequence[str], int]:
        """Return the next texts and the number of characters read of them."""
        start = end = len(self.rows)
        cost = 0
        while end < len(self.texts) and (end == start or cost < _SLICE_CHARACTERS):
            cost += self.cost(self.texts[end])
            end += 1
        return self.texts[start:end], cost


class FairTokenizer:
    """Tokenises on a thread of its own; everything else here runs on the event loop."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="tokenize", initializer=lower_thread_priority, initargs=(_NICE,)
        )
        self._waiting: list[tuple[int, int, _Job]] = []  # (deadline, order of arrival, job)
        self._order = itertools.count()
        self._read = 0  # characters of all slices
        self._current: _Job | None = None
        self.seconds_per_character = 0.0  # moving average; 0 until the first slice

    def wait_estimate_s(self, n_characters: int) -> float:
        """Estimate the seconds until ``n_characters`` of a new request are tokenised."""
        jobs = [job for _, _, job in self._waiting if not job.done.done()]
        ahead = sum(min(job.left, n_characters) for job in jobs)
        if self._current is not None:
            ahead += min(self._current.left, max(n_characters, _SLICE_CHARACTERS))
        return (ahead + n_characters) * self.seconds_per_character

    async def tokenize(
        self, tokenize: Tokenize, texts: Sequence[str], task: str, most_characters: int
    ) -> list[list[int]]:
        """Return ``tokenize(texts, task)``; at most ``most_characters`` of a text are read.

        Cancelling the call removes the waiting texts from the queue.
        """
        done: asyncio.Future[list[list[int]]] = asyncio.get_running_loop().create_future()
        job = _Job(tokenize, task, texts, most_characters, done, 0)
        job.left = sum(map(job.cost, texts))
        self._queue(job)
        self._start()
        return await done

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _queue(self, job: _Job) -> None:
        deadline = self._read + _PATIENCE * job.next_slice()[1]
        heapq.heappush(self._waiting, (deadline, next(self._order), job))

    def _start(self) -> None:
        """Start the slice with the nearest deadline, if the thread is free."""
        while self._current is None and self._waiting:
            _, _, job = heapq.heappop(self._waiting)
            if job.done.done():  # its request was cancelled
                continue
            self._current = job
            texts, cost = job.next_slice()
            self._read += cost
            started_s = time.perf_counter()
            working = asyncio.get_running_loop().run_in_executor(self._pool, job.tokenize, texts, job.task)
            working.add_done_callback(partial(self._finish, job, cost, started_s))

    def _finish(self, job: _Job, cost: int, started_s: float, ran: asyncio.Future[list[list[int]]]) -> None:
        self._current = None
        job.left -= cost
        error = RuntimeError("The server stopped.") if ran.cancelled() else ran.exception()
        if error is not None:
            if not job.done.done():
                job.done.set_exception(error)
        else:
            each = (time.perf_counter() - started_s) / cost
            known = self.seconds_per_character
            self.seconds_per_character = 0.7 * known + 0.3 * each if known else each
            job.rows += ran.result()
            if len(job.rows) < len(job.texts):
                self._queue(job)
            elif not job.done.done():
                job.done.set_result(job.rows)
        self._start()
