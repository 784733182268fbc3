"""Ask the teacher for the calls that the journal lacks, within the limits of pace and budget.

The module knows nothing of rows or labels: it takes calls and fills the journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from sbs_edge.teacher.calls import Answer, CallFailed, Sampling, Teacher
from sbs_edge.teacher.cost import Budget, TokenEstimator
from sbs_edge.teacher.journal import Journal, Record
from sbs_edge.teacher.limits import RateGate, backoff_seconds, retry_after_seconds
from sbs_edge.teacher.prompt import Call
from sbs_edge.teacher.stop import StopRule, TeacherUnavailableError

__all__ = ["AskStats", "TeacherUnavailableError", "ask", "no_answer"]


@dataclass(slots=True)
class AskStats:
    """The statistics of a run.

    Attributes:
        answered: calls with an answer in the journal (refusals included).
        attempts: requests sent, retries included.
        unanswered: calls given up after all retries, by reason; the next run sends them again.
        last_failure: the words of the last call that was refused or given up, or None.
        stopped: the reason why calls were left out (``budget``), or None.
        waited_seconds: time spent waiting for the server's limits.

    """

    answered: int = 0
    attempts: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)
    last_failure: str | None = None
    stopped: str | None = None
    waited_seconds: float = 0.0

    def add(self, other: AskStats) -> None:
        """Add what a later round did, its unanswered calls included."""
        self.add_requests(other)
        for reason, number in other.unanswered.items():
            self.unanswered[reason] = self.unanswered.get(reason, 0) + number
        self.last_failure = other.last_failure or self.last_failure
        self.stopped = other.stopped or self.stopped

    def add_requests(self, other: AskStats) -> None:
        """Count the requests of another round, whose unanswered calls are asked again or not needed."""
        self.answered += other.answered
        self.attempts += other.attempts
        self.waited_seconds = round(self.waited_seconds + other.waited_seconds, 3)


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
    server: str = "",
    stats: AskStats | None = None,
    on_record: Callable[[Record], None] | None = None,
    on_wait: Callable[[float, str], None] | None = None,
) -> AskStats:
    """Send every call and journal its answer.

    Args:
        calls: the calls, taken lazily, at most ``concurrency`` at a time.
        teacher: see :class:`~sbs_edge.teacher.calls.Teacher`.
        journal: open journal that takes the answers.
        sampling: request parameters.
        budget: admits calls.
        concurrency: requests in flight at once.
        max_attempts: attempts per call before it is left to the next run.
        give_up_after: number of consecutive calls without any answer after which the run stops; see
            :class:`~sbs_edge.teacher.stop.StopRule`.
        estimator: characters to tokens, for the budget.
        server: the address in a form that may be shown; stored with each record.
        stats: counts the requests, also those of a run that ends with an error; None: new ones.
        on_record: called after each answer is in the journal.
        on_wait: called with seconds and reason before a wait that a person would notice.

    Raises:
        TeacherUnavailableError: the key, the address or a parameter is wrong, or nothing answers any more.

    """
    stop = StopRule(teacher.model, server, sampling.field_names(), give_up_after)
    run = _Run(
        teacher, journal, sampling, budget, max_attempts, estimator or TokenEstimator(), stop, server,
        stats or AskStats(), on_wait,
    )  # fmt: skip
    source = iter(calls)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max(1, concurrency)):
                group.create_task(run.work(source, on_record))
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    run.stats.waited_seconds = round(run.gate.waited_seconds, 3)
    return run.stats


def _first(group: BaseExceptionGroup) -> BaseException:
    """Return the error that ended the run: the workers have the same cause, whose message says more than the group's."""
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


class _Run:
    def __init__(
        self,
        teacher: Teacher,
        journal: Journal,
        sampling: Sampling,
        budget: Budget,
        max_attempts: int,
        estimator: TokenEstimator,
        stop: StopRule,
        server: str,
        stats: AskStats,
        on_wait: Callable[[float, str], None] | None,
    ) -> None:
        self.teacher, self.journal, self.sampling, self.budget = teacher, journal, sampling, budget
        self.max_attempts, self.estimator, self.stop, self.server = max_attempts, estimator, stop, server
        self.gate = RateGate(on_wait)
        self.stats = stats

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
                if failure.reason != "refused":  # a refusal by a content filter concerns only this row
                    self.stop.attempt_failed(failure)
                if not failure.retry:
                    return self._refused(call, failure, started, attempt)
                if attempt + 1 == self.max_attempts:
                    self._gave_up(failure)
                    return None
                await self._pause(failure, attempt)
                continue
            except BaseException:
                self.gate.leave(n_tokens, None)
                raise
            self.gate.leave(n_tokens, answer.headers)
            self.stop.success()
            return self._record(call, answer, started, attempt, no_answer(answer))
        return None

    async def _pause(self, failure: CallFailed, attempt: int) -> None:
        jitter = backoff_seconds(attempt)
        asked = retry_after_seconds(failure.headers)
        if asked is not None:
            reason = f"the server asked for it ({failure.reason})"
            self.gate.hold(asked, reason)  # for every worker, because the limit is the account's
            await asyncio.sleep(asked + min(jitter, 0.25 * asked + 0.05))
        else:
            if jitter >= 5.0:
                self.gate.say(jitter, f"attempt {attempt + 1} of one call failed with {failure}")
            await asyncio.sleep(jitter)

    def _refused(self, call: Call, failure: CallFailed, started: float, attempt: int) -> Record:
        if failure.reason != "refused":
            self.stats.last_failure = str(failure)
            self.stop.call_failed(failure)
        return self._record(call, Answer(""), started, attempt, str(failure))

    def _gave_up(self, failure: CallFailed) -> None:
        self.stats.unanswered[failure.reason] = self.stats.unanswered.get(failure.reason, 0) + 1
        self.stats.last_failure = str(failure)
        self.stop.call_failed(failure)

    def _record(self, call: Call, answer: Answer, started: float, attempt: int, error: str | None) -> Record:
        counted = answer.prompt_tokens is not None
        asked = answer.prompt_tokens if answer.prompt_tokens is not None else 0
        if counted:
            self.estimator.learn(call.prompt.n_chars, asked)
        elif answer.text or answer.reasoning:
            asked = self.estimator.tokens(call.prompt.n_chars)
        written = answer.completion_tokens
        if written is None:
            n_chars = len(answer.text) + len(answer.reasoning)
            written = self.estimator.tokens(n_chars) if n_chars else 0
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
            server=self.server,
            reasoning=answer.reasoning,
            top_logprobs=answer.top_logprobs,
        )


def no_answer(answer: Answer) -> str | None:
    """Return why an answer that came is of no use, or None."""
    if answer.refusal:
        return f"refused: {answer.refusal}"
    if answer.reasoning and not answer.text.strip() and answer.finish_reason != "length":
        return "thought-only: the model thought and wrote no answer"
    return None
