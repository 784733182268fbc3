"""Asks the teacher what is not yet in the journal: bounded, paced, within the budget, resumable.

Knows nothing of rows or labels: it takes calls and fills the journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from sbs_edge.errors import SbsEdgeError
from sbs_edge.teacher.calls import Answer, CallFailed, Sampling, Teacher
from sbs_edge.teacher.cost import Budget, TokenEstimator
from sbs_edge.teacher.journal import Journal, Record
from sbs_edge.teacher.limits import RateGate, backoff_seconds
from sbs_edge.teacher.prompt import Call

__all__ = ["AskStats", "TeacherUnavailableError", "ask"]


class TeacherUnavailableError(SbsEdgeError):
    """The teacher cannot be used at all; what it has answered is in the journal."""


@dataclass(slots=True)
class AskStats:
    """What one run did.

    Attributes:
        answered: calls that brought an answer now in the journal (refusals included).
        attempts: requests sent, retries included.
        unanswered: calls given up after all retries, by reason; the next run sends them again.
        stopped: why calls were left out (``budget``), or None.
        waited_seconds: time spent waiting for the server's limits.

    """

    answered: int = 0
    attempts: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)
    stopped: str | None = None
    waited_seconds: float = 0.0


async def ask(
    calls: Iterable[Call],
    teacher: Teacher,
    journal: Journal,
    sampling: Sampling,
    budget: Budget,
    *,
    concurrency: int = 8,
    max_attempts: int = 6,
    give_up_after: int = 20,
    estimator: TokenEstimator | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> AskStats:
    """Send every call and journal its answer.

    Args:
        calls: what to ask; taken lazily, at most ``concurrency`` at a time.
        teacher: see :class:`~sbs_edge.teacher.calls.Teacher`.
        journal: open journal that takes the answers.
        sampling: request parameters.
        budget: admits calls.
        concurrency: requests on their way at once.
        max_attempts: how often one call is sent before it is left to the next run.
        give_up_after: consecutive calls without any answer after which the run stops.
        estimator: characters to tokens, for the budget.
        on_record: called after each answer is safe in the journal.

    Raises:
        TeacherUnavailableError: the key or model is wrong, or nothing answers any more.

    """
    run = _Run(teacher, journal, sampling, budget, max_attempts, give_up_after, estimator or TokenEstimator())
    source = iter(calls)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, concurrency)):
                group.create_task(run.work(source, on_record))
    except* TeacherUnavailableError as failures:
        raise failures.exceptions[0] from None
    run.stats.waited_seconds = round(run.gate.waited_seconds, 3)
    return run.stats


class _Run:
    def __init__(
        self,
        teacher: Teacher,
        journal: Journal,
        sampling: Sampling,
        budget: Budget,
        max_attempts: int,
        give_up_after: int,
        estimator: TokenEstimator,
    ) -> None:
        self.teacher, self.journal, self.sampling, self.budget = teacher, journal, sampling, budget
        self.max_attempts, self.give_up_after, self.estimator = max_attempts, give_up_after, estimator
        self.gate = RateGate()
        self.stats = AskStats()
        self.failures_in_a_row = 0

    async def work(self, source: Iterator[Call], on_record: Callable[[Record], None] | None) -> None:
        for call in source:
            likely = self.estimator.tokens(call.prompt.n_chars)
            if not await self.budget.reserve(likely, self.sampling.max_tokens):
                self.stats.stopped = "budget"
                return
            used = (0, 0)
            try:
                record = await self._one(call, likely)
                if record is not None:
                    used = (record.prompt_tokens, record.completion_tokens)
                    await self.journal.append_soon(record)
            finally:
                await self.budget.settle((likely, self.sampling.max_tokens), used)
            if record is not None:
                self.stats.answered += 1
                if on_record is not None:
                    on_record(record)

    async def _one(self, call: Call, likely: int) -> Record | None:
        n_tokens = likely + self.sampling.max_tokens
        for attempt in range(self.max_attempts):
            await self.gate.enter(n_tokens)
            self.stats.attempts += 1
            started = time.perf_counter()
            try:
                answer = await self.teacher.answer(call.prompt, self.sampling, call.sample)
            except CallFailed as failure:
                self.gate.leave(n_tokens, failure.headers)
                if failure.fatal:
                    raise TeacherUnavailableError(
                        f"The teacher {self.teacher.model!r} refuses every call ({failure}). Check the "
                        "address, the key and the model's name; finished calls are in the journal."
                    ) from failure
                if not failure.retry:
                    self.failures_in_a_row = 0
                    return self._record(call, Answer(""), started, attempt, str(failure))
                if attempt + 1 == self.max_attempts:
                    self._gave_up(failure)
                    return None
                await self._pause(failure, attempt)
                continue
            except BaseException:
                self.gate.leave(n_tokens, None)
                raise
            self.gate.leave(n_tokens, answer.headers)
            self.failures_in_a_row = 0
            error = f"refused: {answer.refusal}" if answer.refusal else None
            return self._record(call, answer, started, attempt, error)
        return None

    async def _pause(self, failure: CallFailed, attempt: int) -> None:
        jitter = backoff_seconds(attempt)
        if failure.retry_after is not None:
            self.gate.hold(failure.retry_after)  # for every worker: the limit is the account's
            await asyncio.sleep(failure.retry_after + min(jitter, 0.25 * failure.retry_after + 0.05))
        else:
            await asyncio.sleep(jitter)

    def _gave_up(self, failure: CallFailed) -> None:
        self.stats.unanswered[failure.reason] = self.stats.unanswered.get(failure.reason, 0) + 1
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= self.give_up_after:
            raise TeacherUnavailableError(
                f"The teacher has left {self.failures_in_a_row} calls in a row unanswered, the last with "
                f"{failure}. Finished calls are in the journal; run the same command again to go on."
            ) from failure

    def _record(self, call: Call, answer: Answer, started: float, attempt: int, error: str | None) -> Record:
        counted = answer.prompt_tokens is not None
        asked = answer.prompt_tokens if answer.prompt_tokens is not None else 0
        if counted:
            self.estimator.learn(call.prompt.n_chars, asked)
        elif answer.text:
            asked = self.estimator.tokens(call.prompt.n_chars)
        written = answer.completion_tokens
        if written is None:
            written = self.estimator.tokens(len(answer.text)) if answer.text else 0
        return Record(
            key=call.key,
            text=answer.text,
            finish_reason=answer.finish_reason,
            error=error,
            prompt_tokens=asked,
            completion_tokens=written,
            cost=self.budget.prices.cost(asked, written),
            seconds=round(time.perf_counter() - started, 4),
            attempts=attempt + 1,
            model=self.teacher.model,
            sample=call.sample,
            at=round(time.time(), 3),
        )
