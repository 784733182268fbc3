"""A request from admission to answer: gates, token counts, batchers, escalation.

The module knows nothing of HTTP except the statuses of its refusals.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sbs_edge.errors import AnswerError, SbsEdgeError, UsageError
from sbs_edge.runtime.answers import answer_document
from sbs_edge.runtime.texts import over_limit
from sbs_edge.serve import errors
from sbs_edge.serve.admission import AdmissionSlot, Budget, Gate, PendingEstimate
from sbs_edge.serve.batching import Batcher, QueuedRequest
from sbs_edge.serve.escalate import Escalation
from sbs_edge.serve.inference_request import InferenceRequest, Timing
from sbs_edge.serve.metrics import Metrics
from sbs_edge.serve.models import ModelVersion
from sbs_edge.serve.process_settings import give_memory_back
from sbs_edge.serve.record import Recorder
from sbs_edge.serve.refusals import Refusals
from sbs_edge.serve.registry import Registry
from sbs_edge.serve.settings import ServeSettings
from sbs_edge.serve.states import DRAINING, READY, STARTING, UNSOUND
from sbs_edge.serve.telemetry import Tracing
from sbs_edge.serve.tokenizing import FairTokenizer
from sbs_edge.serve.validation import check_characters, check_request
from sbs_edge.tokens import most_characters

if TYPE_CHECKING:
    from sbs_edge.serve.workers import Peers

__all__ = ["Service"]

# Up to this many characters tokenising (0.4 to 1 us a character) costs no more than switching to a thread and back.
_INLINE_CHARACTERS = 2000

_TRIM_AFTER_S = 0.5


def _leave(gate: Gate, units: int, _: object) -> None:
    gate.leave(units)


def _replace_label(answer: dict[str, Any], label: str) -> None:
    """Put the larger model's label in an answer; the student's label and probabilities move to ``student``."""
    answer["student"] = {name: answer[name] for name in ("label", "probability", "probabilities")}
    answer |= {
        "label": label,
        "probability": None,
        "probabilities": {},
        "escalated": True,
        "abstained": False,
    }


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
        recorder: Recorder | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.metrics = metrics
        self.escalation = escalation
        self.tracing = tracing
        self.recorder = recorder
        self.gate = Gate(settings.max_concurrent, "concurrency")
        self.body_bytes = Budget(settings.max_inside_bytes, self._trim_soon)
        self._trim_due = False
        self.pending = PendingEstimate()
        self.refusals = Refusals(metrics, log=settings.access_log)
        self.started = False
        self.draining = False
        self.failure: BaseException | None = None
        self.peers: Peers | None = None  # the other processes of this server, if there are several
        self._tokenizing = FairTokenizer()

    @property
    def ready(self) -> bool:
        """Return whether requests are answered now."""
        own = self.started and not self.draining and self.registry.ready
        return own and (self.peers is None or self.peers.ready)

    def report_to_peers(self) -> None:
        """Publish this process's state and gauges for the other processes."""
        if self.peers is None:
            return
        if self.draining or not self.started:
            self.peers.report(DRAINING if self.draining else STARTING)
        else:
            self.peers.report(READY if self.registry.ready else UNSOUND)
        self.publish_gauges()

    def publish_gauges(self) -> None:
        """Set the gauges from the server's state."""
        for (name, task), size in self.registry.queue_sizes().items():
            self.metrics.queue_size.labels(name, task).set(size)
        self.metrics.in_flight.set(self.gate.inside)
        self.metrics.ready.set(self.ready)

    def refusal(self, *, labels: bool, n_bytes: int = 0) -> errors.HttpError | None:
        """Return the error (503 or 429) of a request that arrives now and does not fit, or ``None``.

        ``n_bytes`` is the declared size of its body; the bytes are counted when they arrive. The check costs a
        few comparisons, so it is made before the request is read. A request that surely wants ``labels`` is
        rejected if the only model's queue is full; otherwise the queue is checked once the body names the model.
        """
        if self.draining:
            return errors.draining()
        if not self.started:
            return errors.not_ready()
        version = self.registry.only if labels else None
        if version is not None:
            refusal = version.label_gate.refusal(
                1, version.labels.wait_estimate_s(1), ahead=self.pending.texts
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
        """Return freed memory to the system a moment later, when the answers have released theirs too."""
        if not self._trim_due:
            self._trim_due = True
            asyncio.get_running_loop().call_later(_TRIM_AFTER_S, self._trim)

    def _trim(self) -> None:
        self._trim_due = False
        asyncio.get_running_loop().run_in_executor(None, give_memory_back)

    async def answer(
        self,
        version: ModelVersion,
        request: InferenceRequest,
        timing: Timing,
        slot: AdmissionSlot | None = None,
    ) -> list[dict[str, Any]]:
        """Answer a request with ``version``; its texts replace the estimate of ``slot``.

        Cancelling this coroutine removes the request's waiting texts from the queues and frees
        their places at once; a batch that already runs is finished, and its results for them are dropped.
        """
        check_request(request, version.card, self.settings.max_texts)
        n = len(request.texts)
        if slot is not None:
            slot.count_texts(n)
        if n == 0:
            return []
        if not self._truncates(request):
            check_characters(request.texts, version.card.max_source_tokens)
        most = most_characters(version.card.max_source_tokens)
        n_characters = sum(min(len(text), most) for text in request.texts)
        inline = n_characters <= _INLINE_CHARACTERS
        before_s = 0.0 if inline else self._tokenizing.wait_estimate_s(n_characters)
        held: dict[Batcher[Any, Any], Gate] = {}
        version.leases += 1
        try:
            for wanted, gate, batcher in (
                (request.want_label, version.label_gate, version.labels),
                (request.explain, version.rationale_gate, version.rationales),
            ):
                if wanted:
                    gate.enter(n, batcher.wait_estimate_s(1), before_s)
                    held[batcher] = gate
            return await self._run(version, request, timing, held)
        finally:
            for gate in held.values():
                gate.leave(n)
            version.release()

    def _truncates(self, request: InferenceRequest) -> bool:
        return self.settings.truncate if request.truncate is None else request.truncate

    async def _run(
        self,
        version: ModelVersion,
        request: InferenceRequest,
        timing: Timing,
        held: dict[Batcher[Any, Any], Gate],
    ) -> list[dict[str, Any]]:
        """Queue the texts for every task asked for; leave each gate as soon as its task is done."""
        n = len(request.texts)
        batchers = list(held)
        queued: list[tuple[Batcher[Any, Any], QueuedRequest[Any, Any]]] = []
        # Others may wait a moment for texts like their own, but not for long ones, which fill a batch alone.
        announced = batchers if sum(map(len, request.texts)) <= _INLINE_CHARACTERS * n else []
        for batcher in announced:
            batcher.expected += 1
        try:
            try:
                tokens = [
                    await self._tokenize(
                        version, request, "label" if batcher is version.labels else "rationale", timing
                    )
                    for batcher in batchers
                ]
            finally:
                for batcher in announced:
                    batcher.expected -= 1
            limit = version.card.max_source_tokens
            for batcher, rows in zip(batchers, tokens, strict=True):
                payloads: list[Any]
                if batcher is version.labels:
                    given: Sequence[Any] = request.labels or [None] * n
                    payloads = list(zip(request.texts, rows, given, strict=True))
                    group: Any = "label"
                else:
                    payloads = [
                        (text, ids, request.max_new_tokens)
                        for text, ids in zip(request.texts, rows, strict=True)
                    ]
                    group = request.max_new_tokens
                n_tokens = [min(len(ids), limit) for ids in rows]
                queued_request = batcher.submit(payloads, n_tokens, group)
                queued.append((batcher, queued_request))
                queued_request.future.add_done_callback(partial(_leave, held.pop(batcher), n))
            results = [await queued_request.future for _, queued_request in queued]
        finally:
            for batcher, queued_request in queued:
                if not queued_request.future.done() or queued_request.waiting:
                    batcher.abandon(queued_request)
        for _, queued_request in queued:
            timing.queue_s = max(timing.queue_s, queued_request.started_s - queued_request.enqueued_s)
            timing.inference_s = max(timing.inference_s, queued_request.finished_s - queued_request.started_s)
        for row in results:
            for item in row:
                if isinstance(item, UsageError):
                    raise errors.bad_request(str(item)) from item
                if isinstance(item, Exception):
                    if isinstance(item, AnswerError):
                        self.registry.distrust(version, item)
                    raise item
        predictions = results[0] if request.want_label else None
        explanations = results[-1] if request.explain else None
        answers = self._documents(version, predictions, explanations)
        if self.escalation and predictions is not None:
            await self._escalate(version, request, answers, timing)
        if predictions is not None:
            n_abstained = sum(answer["abstained"] for answer in answers)
            if n_abstained:
                self.metrics.abstained.labels(version.card.name).inc(n_abstained)
            if self.recorder is not None:
                self.recorder.offer(version.card.name, version.card.version, request, answers)
        return answers

    async def _tokenize(
        self, version: ModelVersion, request: InferenceRequest, task: str, timing: Timing
    ) -> list[list[int]]:
        """Return each text's tokens; 400 for a text over the model's limit unless it may be truncated."""
        started = time.perf_counter()
        texts = request.texts
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
        if not self._truncates(request):
            for index, ids in enumerate(rows):
                if len(ids) > limit or len(texts[index]) > most_characters(limit):
                    raise errors.bad_request(
                        over_limit(f"texts[{index}]", texts[index], len(ids), limit, "truncate")
                    )
        self.metrics.input_tokens.labels(name).inc(sum(min(len(ids), limit) for ids in rows))
        return rows

    def _documents(self, version: ModelVersion, predictions: Any, explanations: Any) -> list[dict[str, Any]]:
        """Return the JSON document of each answer."""
        none = itertools.repeat(None)
        documents = [
            answer_document(prediction, explanation)
            for prediction, explanation in zip(predictions or none, explanations or none, strict=False)
        ]
        if predictions is not None:
            threshold = self.settings.abstain_below
            for document in documents:
                document["escalated"] = False
                if threshold is not None:
                    document["abstained"] = document["probability"] < threshold
        if explanations is not None:
            n_tokens = sum(explanation.n_tokens for explanation in explanations)
            self.metrics.output_tokens.labels(version.card.name).inc(n_tokens)
            if predictions is not None:
                for document, explanation in zip(documents, explanations, strict=True):
                    document["truncated"] = document["truncated"] or explanation.truncated
        return documents

    async def _escalate(
        self, version: ModelVersion, request: InferenceRequest, answers: list[dict[str, Any]], timing: Timing
    ) -> None:
        """Ask the larger model about the texts on which the student abstained, and use its labels."""
        escalation = self.escalation
        unsure = [i for i, answer in enumerate(answers) if answer["abstained"]]
        if escalation is None or not unsure:
            return
        started = time.perf_counter()
        asked = [
            escalation.ask(request.texts[i], request.labels[i] if request.labels else version.card.labels)
            for i in unsure
        ]
        for i, (label, result) in zip(unsure, await asyncio.gather(*asked), strict=True):
            self.metrics.escalations.labels(version.card.name, result).inc()
            if label is not None:
                _replace_label(answers[i], label)
        timing.escalate_s = time.perf_counter() - started

    async def close(self) -> None:
        """Stop the threads, and close models and connections."""
        self.refusals.flush()
        self._tokenizing.close()
        self.registry.close()
        if self.escalation:
            await self.escalation.close()
        if self.recorder:
            await asyncio.get_running_loop().run_in_executor(None, self.recorder.close)
        if self.tracing:
            await asyncio.get_running_loop().run_in_executor(None, self.tracing.close)
