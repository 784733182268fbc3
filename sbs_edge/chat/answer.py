"""The result of one call to a model: an answer, or a failure that says how to proceed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Answer", "CallFailed"]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. Token counts are None if the server gives none.

    ``text`` is the message's content, or the arguments of its function call; ``reasoning`` is what the server sent
    in a field of its own. ``top_logprobs`` holds the last tokens of the text, each with the log-probabilities of the
    likeliest tokens at its place, if the server was asked for them and gave them.
    """

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    refusal: str | None = None
    reasoning: str = ""
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    top_logprobs: tuple[tuple[str, dict[str, float]], ...] = ()


class CallFailed(Exception):
    """A call that gave no answer.

    Attributes:
        reason: short and stable, such as ``http-429`` or ``rejected``.
        retry: whether the same call may succeed later.
        fatal: whether every further call would fail too (wrong key, unknown model).
        headers: the response's headers, if there was one.

    """

    def __init__(
        self,
        reason: str,
        detail: str,
        *,
        retry: bool = False,
        fatal: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.retry = retry
        self.fatal = fatal
        self.headers = headers or {}

    def reworded(self, detail: str) -> CallFailed:
        """Return the same failure with other words."""
        return CallFailed(
            self.reason,
            detail,
            retry=self.retry,
            fatal=self.fatal,
            headers=self.headers,
        )
