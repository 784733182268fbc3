"""A queue in front of a graph: texts of similar length form a batch, up to a budget of tokens.

A :class:`Batcher` runs one task (labels or rationales) of a model version on its own threads, so that a long
rationale never delays a label. A batch costs ``len(batch) * longest text`` tokens; about 256 to 512 tokens per call
measured best on CPUs (larger batches add latency, not throughput).

Every text has a deadline, counted in served tokens: those served when it came, plus a multiple of its own. The text
with the nearest deadline starts the next batch. So a short text overtakes long ones that wait, and a long one is
overtaken only until that multiple of its tokens has been served.

A free worker starts at once. Only while admitted requests are still being tokenised does it wait for them, at most
``max_wait_s``; a lone request at low load never waits. With a backlog of quick batches the next full one is handed
over while the previous one runs, so that a worker is not idle until a busy event loop can serve it. Behind a slow
batch nothing is handed over: a short text that comes meanwhile would have to wait for both.

A lone short text runs on the event loop's own thread if it takes less time than two thread switches; texts that
wait, are long or were slow run on a worker.

Everything except ``work`` runs on the event loop's thread, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

from sbs_edge.serve.process_settings import lower_thread_priority

__all__ = ["Batcher", "QueuedRequest"]

# The longest work, in seconds and tokens, that may run on the event loop. New connections wait for it, but a worker
# would hold the interpreter lock for part of that time too. Switching to a worker and back costs 0.1 to 0.3 ms each.
_INLINE_S = 0.0015
_INLINE_TOKENS = 64

# A text is overtaken by shorter ones until so many times its own tokens have been served.
_PATIENCE = 8

# The longest batch that the next one is handed over behind. Below it an idle worker costs more than the longer wait.
_AHEAD_S = 0.003

_FULL = 0.5  # part of the token budget from which a text costs about as much as in a full batch

Payload = TypeVar("Payload")
Result = TypeVar("Result")


class QueuedRequest(Generic[Payload, Result]):
    """The texts of a request in a queue, and a future of their results in order."""

    __slots__ = (
        "_left",
        "abandoned",
        "enqueued_s",
        "finished_s",
        "future",
        "payloads",
        "results",
        "served_before",
        "started_s",
        "waiting",
    )

    def __init__(
        self, payloads: Sequence[Payload], loop: asyncio.AbstractEventLoop, served_before: int = 0
    ) -> None:
        self.payloads = payloads
        self.served_before = served_before  # tokens that the queue had served when the request came
        self.results: list[Any] = [None] * len(payloads)
        self.waiting = len(payloads)  # texts not yet given to a worker
        self._left = len(payloads)  # texts without a result
        self.future: asyncio.Future[list[Result]] = loop.create_future()
        self.abandoned = False
        self.enqueued_s = time.perf_counter()
        self.started_s = 0.0
        self.finished_s = 0.0

    def _put(self, index: int, result: Result) -> None:
        self.results[index] = result
        self._left -= 1
        if self._left == 0 and not self.future.done():
            self.finished_s = time.perf_counter()
            self.future.set_result(self.results)

    def _fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)
            self.future.exception()  # marks it as retrieved: its client may have left


QueuedText = tuple[QueuedRequest[Any, Any], int]  # a request and the index of one of its texts


class _FinishedBatch(NamedTuple):
    """A finished batch: texts still wanted, results, start, end, and used part of the budget; times in seconds."""

    wanted: list[QueuedText]
    results: Sequence[Any]
    started_s: float
    finished_s: float
    fill: float


class Batcher(Generic[Payload, Result]):
    """The queue and the threads of a task.

    Args:
        work: called on a worker thread with the payloads of a batch; returns a result for each.
        max_batch_tokens: bound on ``len(batch) * longest`` (a longer text runs alone).
        max_wait_s: longest time a text waits for others to join its batch.
        workers: number of threads; each runs one batch at a time.
        ahead: full batches that may be handed over while others run. Texts abandoned meanwhile are skipped.
        nice: niceness of the threads above that of the event loop.
        on_batch: called after each batch with its number of texts, its seconds, and the waiting time of each text.
    """

    def __init__(
        self,
        work: Callable[[list[Payload]], Sequence[Result]],
        *,
        max_batch_tokens: int = 512,
        max_wait_s: float = 0.002,
        workers: int = 1,
        ahead: int = 0,
        name: str = "batcher",
        nice: int = 0,
        on_batch: Callable[[int, float, list[float]], None] | None = None,
    ) -> None:
        self._work = work
        self._max_batch_tokens = max_batch_tokens
        self._max_wait_s = max_wait_s
        self._on_batch = on_batch
        self._pool = ThreadPoolExecutor(
            workers, thread_name_prefix=name, initializer=lower_thread_priority, initargs=(nice,)
        )
        self._workers = workers
        self._idle = workers  # below zero: batches handed over ahead
        self._ahead = ahead
        # Waiting texts by (group, token count): a batch holds a single group and similar lengths.
        self._waiting: dict[Hashable, dict[int, deque[QueuedText]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._dispatch_due = False
        self._closed = False
        self._served = 0  # tokens of all batches, padding included
        self.queued = 0  # texts waiting for a worker
        self.expected = 0  # requests admitted for this batcher that are still being tokenised
        self.seconds_per_text = 0.0  # worker time of a text in a full batch, 0 until the first batch
        self._lone_s = 0.0  # time of recent texts that ran alone; see _learn
        self._full_s = 0.0  # mean time of recent full batches
        self._n_full = 0

    def wait_estimate_s(self, n_texts: int) -> float:
        """Estimate the seconds until ``n_texts`` texts are done; 0 before the first batch.

        The estimate learns from full batches, because a queue is processed in full batches. A lone text costs
        several times as much, and the first texts after a start even more.
        """
        return n_texts * self.seconds_per_text / self._workers

    def submit(
        self, payloads: Sequence[Payload], n_tokens: Sequence[int], group: Hashable = None
    ) -> QueuedRequest[Payload, Result]:
        """Queue the texts of a request; ``n_tokens[i]`` is the length of ``payloads[i]`` in tokens."""
        if self._closed:
            raise RuntimeError("The queue is closed.")
        loop = asyncio.get_running_loop()
        request: QueuedRequest[Payload, Result] = QueuedRequest(payloads, loop, self._served)
        lengths = self._waiting.setdefault(group, {})
        for index, length in enumerate(n_tokens):
            row = lengths.get(length)
            if row is None:
                row = lengths[length] = deque()
            row.append((request, index))
        self.queued += len(payloads)
        self._dispatch_soon(loop)
        return request

    def abandon(self, request: QueuedRequest[Payload, Result]) -> None:
        """Abandon a request: its waiting texts will not run, and leave the queue now."""
        if not request.abandoned:
            request.abandoned = True
            self.queued -= request.waiting
            request.future.cancel()

    def close(self) -> None:
        """Stop the threads once running work is done; waiting texts fail."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
        for lengths in self._waiting.values():
            for row in lengths.values():
                for request, _ in row:
                    request._fail(RuntimeError("The server stopped before this work began."))
        self._waiting.clear()
        self.queued = 0
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _dispatch_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # Deferred by one iteration of the loop, so that requests parsed in the same iteration share a batch.
        if not self._dispatch_due:
            self._dispatch_due = True
            loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_due = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
        ahead = self._ahead if self._full_s <= _AHEAD_S else 0
        while self._idle > -ahead and self.queued and not self._closed:
            group, first = self._first()
            if first is None:
                return
            n_tokens = max(first[1], self.queued * self._shortest(group))
            full = n_tokens >= self._max_batch_tokens
            if not full and self._idle <= 0:
                return
            if not full and self.expected:
                remaining = first[0].enqueued_s + self._max_wait_s - time.perf_counter()
                if remaining > 0:
                    self._timer = asyncio.get_running_loop().call_later(remaining, self._dispatch)
                    return
            batch, n_tokens = self._take(group, len_of_first=first[1])
            self._served += n_tokens
            if batch and self._is_quick(batch, first[1]):
                self._run_here(batch, n_tokens)
            elif batch:
                self._start(batch, n_tokens)

    def _first(self) -> tuple[Hashable, tuple[QueuedRequest[Payload, Result], int] | None]:
        """Return the group and (request, token count) of the text with the nearest deadline; drop abandoned texts."""
        best: tuple[QueuedRequest[Payload, Result], int] | None = None
        best_group: Hashable = None
        nearest = 0
        for group in list(self._waiting):
            lengths = self._waiting[group]
            for length in list(lengths):
                row = lengths[length]
                while row and row[0][0].abandoned:
                    row.popleft()
                if not row:
                    del lengths[length]
                    continue
                deadline = row[0][0].served_before + _PATIENCE * length
                if best is None or deadline < nearest:
                    best, best_group, nearest = (row[0][0], length), group, deadline
            if not lengths:
                del self._waiting[group]
        return best_group, best

    def _shortest(self, group: Hashable) -> int:
        return min(self._waiting[group])

    def _take(self, group: Hashable, len_of_first: int) -> tuple[list[QueuedText], int]:
        """Remove a batch from the queue: the first text, then those nearest to it in length, within the budget.

        Returns the batch and its number of tokens, padding included.
        """
        lengths = self._waiting[group]
        batch: list[QueuedText] = []
        longest = 0
        for length in sorted(lengths, key=lambda n: abs(n - len_of_first)):
            row = lengths[length]
            widest = max(longest, length)
            while row and (not batch or (len(batch) + 1) * widest <= self._max_batch_tokens):
                request, index = row.popleft()
                if request.abandoned:
                    continue
                longest = widest
                batch.append((request, index))
                request.waiting -= 1
                self.queued -= 1
            if not row:
                del lengths[length]
            if batch and (len(batch) + 1) * max(longest, 1) > self._max_batch_tokens:
                break
        if not lengths:
            del self._waiting[group]
        return batch, len(batch) * longest

    def _is_quick(self, batch: list[QueuedText], length: int) -> bool:
        """Return whether ``batch`` is a lone short text, and such texts have been quick."""
        alone = len(batch) == 1 and not self.queued and not self.expected
        free = self._workers == 1 and self._idle == 1  # several workers are meant to run in parallel
        return alone and free and length <= _INLINE_TOKENS and 0 < self._lone_s <= _INLINE_S

    def _run_here(self, batch: list[QueuedText], n_tokens: int) -> None:
        self._idle -= 1
        done: asyncio.Future[_FinishedBatch] = asyncio.get_running_loop().create_future()
        try:
            done.set_result(self._run(batch, n_tokens))
        except Exception as error:
            done.set_exception(error)
        self._finish(batch, done)

    def _start(self, batch: list[QueuedText], n_tokens: int) -> None:
        self._idle -= 1
        done = asyncio.get_running_loop().run_in_executor(self._pool, self._run, batch, n_tokens)
        done.add_done_callback(lambda future: self._finish(batch, future))

    def _run(self, batch: list[QueuedText], n_tokens: int) -> _FinishedBatch:
        """Run the texts of ``batch`` that are still wanted; called on a worker."""
        started_s = time.perf_counter()
        wanted = [(request, index) for request, index in batch if not request.abandoned]
        results = self._work([request.payloads[index] for request, index in wanted]) if wanted else ()
        fill = min(1.0, n_tokens * len(wanted) / (len(batch) * self._max_batch_tokens))
        return _FinishedBatch(wanted, results, started_s, time.perf_counter(), fill)

    def _finish(self, batch: list[QueuedText], done: asyncio.Future[_FinishedBatch]) -> None:
        self._idle += 1
        error = RuntimeError("The server stopped.") if done.cancelled() else done.exception()
        if error is not None:
            for request, _ in batch:
                request._fail(error)
        elif done.result().wanted:
            self._answer(done.result())
        if self.queued and not self._closed:
            self._dispatch()

    def _answer(self, ran: _FinishedBatch) -> None:
        for (request, index), result in zip(ran.wanted, ran.results, strict=True):
            request.started_s = min(request.started_s or ran.started_s, ran.started_s)
            request._put(index, result)
        elapsed = ran.finished_s - ran.started_s
        self._learn(elapsed, len(ran.wanted), ran.fill)
        if self._on_batch:
            waited = [ran.started_s - request.enqueued_s for request, _ in ran.wanted]
            self._on_batch(len(ran.wanted), elapsed, waited)

    def _learn(self, elapsed_s: float, n_texts: int, fill: float) -> None:
        """Update the estimates with the time of a batch that used the part ``fill`` of the token budget."""
        each = elapsed_s / n_texts
        if n_texts == 1:
            # After a slow text the next ones run on a worker. Their minimum counts: on a busy machine most take longer
            # there, and by a mean they would never be quick again.
            slowed = each > _INLINE_S >= self._lone_s
            self._lone_s = each if slowed or not self._lone_s else min(each, 1.05 * self._lone_s)
        if fill >= _FULL:
            self._n_full += 1  # the mean of the first ten, so that a slow start weighs a tenth
            weight = max(0.1, 1 / self._n_full)
            self.seconds_per_text += weight * (each - self.seconds_per_text)
            self._full_s += weight * (elapsed_s / fill - self._full_s)
        elif not self._n_full:
            self.seconds_per_text = each * fill  # a lower bound: a full batch takes at least as long
