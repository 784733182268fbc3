"""One request from admission to answer: gates, token counts, lanes, cascade.

Knows nothing of HTTP beyond the statuses it refuses with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sbs_edge.errors import AnswerError, SbsEdgeError, UsageError
from sbs_edge.runtime.texts import over_limit
from sbs_edge.serve import errors
from sbs_edge.serve.admission import AdmissionSlot, Budget, Gate, PendingEstimate
from sbs_edge.serve.batching import Batcher, QueuedRequest
from sbs_edge.serve.escalate import Escalation
from sbs_edge.serve.inference_request import Answer, InferenceRequest, Timing
from sbs_edge.serve.metrics import Metrics
from sbs_edge.serve.models import ModelVersion, Registry
from sbs_edge.serve.process_settings import give_memory_back
from sbs_edge.serve.refusals import Refusals
from sbs_edge.serve.settings import ServeSettings
from sbs_edge.serve.states import DRAINING, READY, STARTING, UNSOUND
from sbs_edge.serve.telemetry import Tracing
from sbs_edge.serve.tokenizing import FairTokenizer
from sbs_edge.tokens import most_characters

if TYPE_CHECKING:
    from sbs_edge.serve.workers import Peers

__all__ = ["Service"]

# Below this many characters tokenising (about 1 us a character) is cheaper than a thread switch.
_INLINE_CHARACTERS = 1000

_TRIM_AFTER_S = 0.5


def _leave(gate: Gate, units: int, _: object) -> None:
    gate.leave(units)


class Service:
    """State of a running server and the path of a request through it."""

    def __init__(
        self,
        settings: ServeSettings,
        registry: Registry,
        metrics: Metrics,
        *,
        escalation: Escalation | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.metrics = metrics
        self.escalation = escalation
        self.tracing = tracing
        self.gate = Gate(settings.max_concurrent, "concurrency")
        self.body_bytes = Budget(settings.max_inside_bytes, self._trim_soon)
        self._trim_due = False
        self.coming = PendingEstimate()
        self.refusals = Refusals(metrics, log=settings.access_log)
        self.started = False
        self.draining = False
        self.failure: BaseException | None = None
        self.peers: Peers | None = None  # the other processes of this server
        self._tokenizing = FairTokenizer()

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        own = self.started and not self.draining and self.registry.ready
        return own and (self.peers is None or self.peers.ready)

    def report_to_peers(self) -> None:
        """Tell the other processes this one's state, and put its gauges where all are read."""
        if self.peers is None:
            return
        if self.draining or not self.started:
            self.peers.report(DRAINING if self.draining else STARTING)
        else:
            self.peers.report(READY if self.registry.ready else UNSOUND)
        self.publish_gauges()

    def publish_gauges(self) -> None:
        """Set the metrics that are read from the server's state."""
        for (name, task), size in self.registry.queue_sizes().items():
            self.metrics.queue_size.labels(name, task).set(size)
        self.metrics.in_flight.set(self.gate.inside)
        self.metrics.ready.set(self.ready)

    def refusal(self, *, labels: bool, n_bytes: int = 0) -> errors.HttpError | None:
        """Return what a request arriving now would be refused with (503 or 429), or ``None``.

        ``n_bytes`` is the size its body is said to have; it is counted when it arrives.
        Costs a few comparisons, so it is asked before a request is read. One that surely wants
        ``labels`` is refused when the queue of the only model's newest version is full; otherwise
        the queue is looked at once the body says whose.
        """
        if self.draining:
            return errors.draining()
        if not self.started:
            return errors.not_ready()
        version = self.registry.only if labels else None
        if version is not None:
            refusal = version.label_gate.refusal(
                1, version.labels.wait_estimate_s(1), ahead=self.coming.texts
            )
            if refusal is not None:
                return refusal
        if (
            self.body_bytes.inside + n_bytes > self.body_bytes.limit
            and n_bytes <= self.settings.max_body_bytes
        ):
            return self.body_bytes.refusal(n_bytes)
        return self.gate.refusal(1)

    def _trim_soon(self) -> None:
        """Give freed memory back a moment later, when answers have let go of it too."""
        if not self._trim_due:
            self._trim_due = True
            asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._trim_due = False
        asyncio.get_running_loop().run_in_executor(None, give_memory_back)

    async def answer(
        self,
        version: ModelVersion,
        asking: InferenceRequest,
        timing: Timing,
        passage: AdmissionSlot | None = None,
    ) -> list[Answer]:
        """Answer one request on ``version``; its texts are ``counted`` in ``passage`` at the queues.

        Cancelling this coroutine takes the request's waiting texts out of the queues and frees
        their places at once; a batch that already runs is finished and its share dropped.
        """
        self._check(version, asking)
        n = len(asking.texts)
        if passage is not None:
            passage.counted(n)
        if n == 0:
            return []
        self._check_characters(version, asking)
        most = most_characters(version.card.max_source_tokens)
        n_characters = sum(min(len(text), most) for text in asking.texts)
        inline = n_characters <= _INLINE_CHARACTERS
        before_s = 0.0 if inline else self._tokenizing.wait_estimate_s(n_characters)
        held: dict[Batcher[Any, Any], Gate] = {}
        version.leases += 1
        try:
            for wanted, gate, lane in (
                (asking.want_label, version.label_gate, version.labels),
                (asking.explain, version.rationale_gate, version.rationales),
            ):
                if wanted:
                    gate.enter(n, lane.wait_estimate_s(1), before_s)
                    held[lane] = gate
            return await self._run(version, asking, timing, held)
        finally:
            for gate in held.values():
                gate.leave(n)
            version.release()

    def _check(self, version: ModelVersion, asking: InferenceRequest) -> None:
        limit = self.settings.max_texts
        if len(asking.texts) > limit:
            raise errors.bad_request(
                f"The request holds {len(asking.texts)} texts; the limit is {limit} (--max-texts)."
            )
        kind = version.card.label_kind
        if kind == "choices" and asking.labels is None and asking.want_label:
            raise errors.bad_request("This model chooses among given answers: send labels.")
        if kind != "choices" and asking.labels is not None:
            raise errors.bad_request("This model has its own answers: leave labels out.")
        if asking.explain and not version.card.explains:
            raise errors.bad_request(
                "This model answers with labels alone: its bundle has no graph that writes rationales. Leave "
                "explain out, or export a student trained with rationales without --label-only."
            )
        most = version.card.max_new_tokens
        if asking.max_new_tokens is not None and asking.max_new_tokens > most:
            raise errors.bad_request(f"max_new_tokens is over this model's limit of {most}.")

    def _truncates(self, asking: InferenceRequest) -> bool:
        return self.settings.truncate if asking.truncate is None else asking.truncate

    def _check_characters(self, version: ModelVersion, asking: InferenceRequest) -> None:
        """Refuse what is over the limit by its characters alone: that needs no tokens."""
        limit = version.card.max_source_tokens
        most = most_characters(limit)
        for index, text in enumerate(asking.texts):
            if len(text) > most and not self._truncates(asking):
                raise errors.bad_request(
                    f"texts[{index}] has {len(text)} characters; this model reads at most {most} "
                    f"({limit} tokens). Shorten it, or ask for truncate."
                )

    async def _run(
        self,
        version: ModelVersion,
        asking: InferenceRequest,
        timing: Timing,
        held: dict[Batcher[Any, Any], Gate],
    ) -> list[Answer]:
        """Queue the texts on every held lane; each gate is left as soon as its lane is done."""
        n = len(asking.texts)
        lanes = list(held)
        tickets: list[tuple[Batcher[Any, Any], QueuedRequest[Any, Any]]] = []
        for lane in lanes:
            lane.expected += 1
        try:
            try:
                tokens = [
                    await self._tokenize(
                        version, asking, "label" if lane is version.labels else "rationale", timing
                    )
                    for lane in lanes
                ]
            finally:
                for lane in lanes:
                    lane.expected -= 1
            limit = version.card.max_source_tokens
            for lane, rows in zip(lanes, tokens, strict=True):
                payloads: list[Any]
                if lane is version.labels:
                    given: Sequence[Any] = asking.labels or [None] * n
                    payloads = list(zip(asking.texts, rows, given, strict=True))
                    group: Any = "label"
                else:
                    payloads = [
                        (text, ids, asking.max_new_tokens)
                        for text, ids in zip(asking.texts, rows, strict=True)
                    ]
                    group = asking.max_new_tokens
                n_tokens = [min(len(ids), limit) for ids in rows]
                ticket = lane.submit(payloads, n_tokens, group)
                tickets.append((lane, ticket))
                ticket.future.add_done_callback(partial(_leave, held.pop(lane), n))
            results = [await ticket.future for _, ticket in tickets]
        finally:
            for lane, ticket in tickets:
                if not ticket.future.done() or ticket.waiting:
                    lane.abandon(ticket)
        for _, ticket in tickets:
            timing.queue_s = max(timing.queue_s, ticket.started_s - ticket.enqueued_s)
            timing.inference_s = max(timing.inference_s, ticket.finished_s - ticket.started_s)
        for row in results:
            for item in row:
                if isinstance(item, UsageError):
                    raise errors.bad_request(str(item)) from item
                if isinstance(item, Exception):
                    if isinstance(item, AnswerError):
                        self.registry.distrust(version, item)
                    raise item
        predictions = results[0] if asking.want_label else None
        explanations = results[-1] if asking.explain else None
        answers = self._merge(version, len(asking.texts), predictions, explanations)
        if self.escalation and predictions is not None:
            await self._escalate(version, asking, answers, timing)
        n_abstained = sum(answer.abstained for answer in answers)
        if n_abstained:
            self.metrics.abstained.labels(version.card.name).inc(n_abstained)
        return answers

    async def _tokenize(
        self, version: ModelVersion, asking: InferenceRequest, task: str, timing: Timing
    ) -> list[list[int]]:
        """Return each text's tokens; 400 for one over the model's limit unless it may be cut."""
        started = time.perf_counter()
        texts = asking.texts
        try:
            if sum(map(len, texts)) <= _INLINE_CHARACTERS:
                rows = version.engine.tokenize(texts, task)
            else:
                most = most_characters(version.card.max_source_tokens)
                rows = await self._tokenizing.tokenize(version.engine.tokenize, texts, task, most)
        except SbsEdgeError as error:
            raise errors.bad_request(str(error)) from error
        elapsed = time.perf_counter() - started
        timing.tokenize_s += elapsed
        name = version.card.name
        self.metrics.tokenize_seconds.labels(name).observe(elapsed)
        limit = version.card.max_source_tokens
        if not self._truncates(asking):
            for index, ids in enumerate(rows):
                if len(ids) > limit or len(texts[index]) > most_characters(limit):
                    raise errors.bad_request(
                        over_limit(f"texts[{index}]", texts[index], len(ids), limit, "truncate")
                    )
        self.metrics.input_tokens.labels(name).inc(sum(min(len(ids), limit) for ids in rows))
        return rows

    def _merge(
        self, version: ModelVersion, n_texts: int, predictions: Any, explanations: Any
    ) -> list[Answer]:
        answers = [Answer() for _ in range(n_texts)]
        threshold = self.settings.abstain_below
        if predictions is not None:
            for answer, p in zip(answers, predictions, strict=True):
                answer.label = p.label
                answer.probability = float(p.probability)
                answer.probabilities = p.probabilities
                answer.abstained = bool(p.abstained if threshold is None else p.probability < threshold)
                answer.truncated = bool(p.truncated)
        if explanations is not None:
            n_tokens = 0
            for answer, e in zip(answers, explanations, strict=True):
                answer.rationale = e.rationale
                answer.rationale_complete = bool(e.complete)
                answer.truncated = answer.truncated or bool(e.truncated)
                n_tokens += e.n_tokens
            self.metrics.output_tokens.labels(version.card.name).inc(n_tokens)
        return answers

    async def _escalate(
        self, version: ModelVersion, asking: InferenceRequest, answers: list[Answer], timing: Timing
    ) -> None:
        """Replace the labels the student is unsure of by the larger model's, where it gives one."""
        escalation = self.escalation
        unsure = [i for i, answer in enumerate(answers) if answer.abstained]
        if escalation is None or not unsure:
            return
        started = time.perf_counter()
        asked = [
            escalation.ask(asking.texts[i], asking.labels[i] if asking.labels else version.card.labels)
            for i in unsure
        ]
        for i, (label, result) in zip(unsure, await asyncio.gather(*asked), strict=True):
            self.metrics.escalations.labels(version.card.name, result).inc()
            if label is not None:
                answers[i].take_over(label)
        timing.escalate_s = time.perf_counter() - started

    async def close(self) -> None:
        """Free threads, models and connections."""
        self.refusals.flush()
        self._tokenizing.close()
        self.registry.close()
        if self.escalation:
            await self.escalation.close()
        if self.tracing:
            await asyncio.get_running_loop().run_in_executor(None, self.tracing.close)
