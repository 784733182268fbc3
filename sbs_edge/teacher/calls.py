"""What every teacher offers: an answer to a prompt, or a failure that says what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sbs_edge.teacher.prompt import Prompt

__all__ = ["Answer", "CallFailed", "Sampling", "Teacher"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the teacher writes: part of every journal key.

    Attributes:
        temperature: 0 is greedy.
        max_tokens: limit of one answer.
        top_p: nucleus; None leaves the server's default.
        seed: first sample's seed, the n-th gets ``seed + n``; None sends none.
        limit_name: the name under which the server takes the limit, such as ``max_completion_tokens``.
        omit: fields that are not sent; ``stop`` may be one of them.
        extra: further fields of the request body, as the server understands them; they win over the others.

    """

    temperature: float = 0.0
    max_tokens: int = 256
    top_p: float | None = None
    seed: int | None = None
    limit_name: str = "max_tokens"
    omit: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self, sample: int = 0) -> dict[str, Any]:
        """Return the request fields for sample number ``sample``."""
        values: dict[str, Any] = {"temperature": self.temperature, self.limit_name: self.max_tokens}
        if self.top_p is not None:
            values["top_p"] = self.top_p
        if self.seed is not None:
            values["seed"] = self.seed + sample
        values |= self.extra
        return {name: value for name, value in values.items() if name not in self.omit}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Token counts are None where the server counts none; thought is kept apart."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    refusal: str | None = None
    has_thought: bool = False
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class CallFailed(Exception):
    """A call brought no answer.

    Attributes:
        reason: short and stable, such as ``http-429`` or ``rejected``.
        retry: whether the same call may succeed later.
        fatal: whether every further call would fail too (wrong key, unknown model).
        retry_after: seconds the server asked to wait, or None.
        headers: the response's headers, if there was one.

    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        retry: bool = False,
        fatal: bool = False,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.fatal = fatal
        self.retry_after = retry_after
        self.headers = headers or {}

    def reworded(self, detail: str) -> CallFailed:
        """Return the same failure with other words."""
        return CallFailed(
            self.reason,
            detail,
            retry=self.retry,
            fatal=self.fatal,
            retry_after=self.retry_after,
            headers=self.headers,
        )


class Teacher(Protocol):
    """Anything that answers prompts. ``model`` is part of every journal key."""

    model: str

    async def answer(self, prompt: Prompt, sampling: Sampling, sample: int) -> Answer:
        """Return the answer or raise :class:`CallFailed`."""
        ...

    async def close(self) -> None:
        """Release connections or memory."""
        ...
