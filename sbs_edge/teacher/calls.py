"""The interface of a teacher, and the requests to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sbs_edge.chat.answer import Answer, CallFailed
from sbs_edge.chat.endpoint import HIDDEN, redacted_fields
from sbs_edge.teacher.prompt import Prompt
from sbs_edge.teacher.structured import form_fields
from sbs_edge.teacher.task import Structured

__all__ = ["Answer", "CallFailed", "Sampling", "Teacher", "request_body", "request_fields"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The parameters of sampling, which are part of every journal key.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: limit of one answer.
        top_p: nucleus; None leaves the server's default.
        seed: first sample's seed, the n-th gets ``seed + n``; None sends none.
        limit_name: the server's name for the limit, such as ``max_completion_tokens``.
        omit: fields that are not sent; ``stop`` may be among them.
        extra: further fields of the request body, which win over the others.
        structured: how a JSON object is asked for, see :data:`~sbs_edge.teacher.structured.Form`; ``auto`` takes the
            first form that the server answers to, or ``off``; ``on`` fails where there is none.

    """

    temperature: float = 0.0
    max_tokens: int = 256
    top_p: float | None = None
    seed: int | None = None
    limit_name: str = "max_tokens"
    omit: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)  # it may hold a secret
    structured: Structured = "off"

    def parameters(self, sample: int = 0) -> dict[str, Any]:
        """Return the request fields for sample number ``sample``."""
        values: dict[str, Any] = {"temperature": self.temperature, self.limit_name: self.max_tokens}
        if self.top_p is not None:
            values["top_p"] = self.top_p
        if self.seed is not None:
            values["seed"] = self.seed + sample
        values |= self.extra
        return {name: value for name, value in values.items() if name not in self.omit}

    def field_names(self) -> list[str]:
        """Return the names that advice on a refused request may speak of; ``--structured`` where a form is asked."""
        return [*self.parameters(), "stop", *([] if self.structured in ("auto", "off") else ["--structured"])]

    def answer_parameters(self) -> dict[str, Any]:
        """Return the fields that change answers, the limit under one name, without secrets."""
        sent = self.parameters()
        if self.structured not in ("auto", "off"):
            sent["structured"] = self.structured
        if self.limit_name in sent:
            sent["max_tokens"] = sent.pop(self.limit_name)
        kept = {name: value for name, value in sent.items() if name not in UNRELATED_TO_ANSWERS}
        shown: dict[str, Any] = redacted_fields(kept)
        return {name: value for name, value in shown.items() if value != HIDDEN}


UNRELATED_TO_ANSWERS = frozenset({
    "user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "stream", "stream_options", "priority", "request_id", "keep_alive", "cache_prompt",
})  # fmt: skip
"""Fields of a request that say how it is served or billed, not what is answered."""


def request_fields(prompt: Prompt, sampling: Sampling, sample: int = 0) -> dict[str, Any]:
    """Return the fields of a request besides model, prompt and stop texts: those that belong to its journal key."""
    fields = form_fields(sampling.structured, prompt.schema) | sampling.parameters(sample)
    return {name: value for name, value in fields.items() if name not in sampling.omit}


def request_body(prompt: Prompt, model: str, sampling: Sampling, sample: int) -> tuple[str, dict[str, Any]]:
    """Return the route and the JSON body of one request."""
    body: dict[str, Any] = {"model": model}
    if prompt.text is not None:
        route, body["prompt"] = "/completions", prompt.text
    else:
        route, body["messages"] = "/chat/completions", prompt.as_messages()
    if prompt.stop:
        body["stop"] = list(prompt.stop)
    return route, {**body, **request_fields(prompt, sampling, sample)}


class Teacher(Protocol):
    """An object that answers prompts. ``model`` is part of every journal key."""

    model: str

    async def answer(self, prompt: Prompt, sampling: Sampling, sample: int) -> Answer:
        """Return the answer or raise :class:`CallFailed`."""
        ...

    async def close(self) -> None:
        """Release connections or memory."""
        ...
