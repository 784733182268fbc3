"""Decide when a run stops: if the server refuses call after call, other rows would be refused too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from sbs_edge.errors import SbsEdgeError
from sbs_edge.teacher.calls import CallFailed
from sbs_edge.teacher.structured import names_form

__all__ = ["StopRule", "TeacherUnavailableError", "advice", "advice_on_answer"]

REFUSED_FROM_THE_START = 5
"""Number of refusals that stop a run in which no call has succeeded yet."""

_OPTIONAL = ("temperature", "max_tokens", "top_p", "seed", "stop")


class TeacherUnavailableError(SbsEdgeError):
    """The teacher cannot be used at all; what it has answered is in the journal.

    ``failure`` is the call that ended the run, where one did.
    """

    def __init__(self, message: str, failure: CallFailed | None = None) -> None:
        super().__init__(message)
        self.failure = failure


class StopRule:
    """Counts failures that no success interrupts.

    A run stops at the first failure that every call would share (wrong key, unknown address), after
    :data:`REFUSED_FROM_THE_START` refusals or unreadable responses before any success, and after ``patience``
    failed calls in a row later on.

    Args:
        model: the teacher's model, for the message.
        server: the address in a form that may be shown.
        fields: the request's fields, for the advice.
        patience: failed calls in a row.

    """

    def __init__(self, model: str, server: str = "", fields: Iterable[str] = (), patience: int = 20) -> None:
        self._model, self._server, self._fields, self._patience = model, server, tuple(fields), patience
        self._succeeded = False
        self._in_a_row = 0
        self._early = 0

    def success(self) -> None:
        """Note a call that the server answered."""
        self._succeeded = True
        self._in_a_row = 0

    def attempt_failed(self, failure: CallFailed) -> None:
        """Note one failed attempt, before it is retried or given up.

        Raises:
            TeacherUnavailableError: no call will succeed.

        """
        if failure.fatal:
            raise self._stop("refuses every call", failure)
        if not self._succeeded and (not failure.retry or failure.reason == "not-the-protocol"):
            self._early += 1
            if self._early >= REFUSED_FROM_THE_START:
                raise self._stop(f"has answered none of {self._early} requests", failure)

    def call_failed(self, failure: CallFailed) -> None:
        """Note a call that is refused or given up after its last attempt.

        Raises:
            TeacherUnavailableError: too many calls in a row failed.

        """
        self._in_a_row += 1
        if self._in_a_row >= self._patience:
            raise self._stop(f"has left {self._in_a_row} calls in a row unanswered", failure)

    def _stop(self, what: str, failure: CallFailed) -> TeacherUnavailableError:
        at = f", asked at {self._server}" if self._server else ""
        remedy = advice(failure, self._server, self._fields)
        return TeacherUnavailableError(
            f"The teacher {self._model!r} {what} ({str(failure).rstrip('. ')}){at}. {remedy} "
            "Finished calls are in the journal; the corrected command continues from there.",
            failure,
        )


def advice(failure: CallFailed, server: str = "", fields: Iterable[str] = ()) -> str:
    """Return what to change after ``failure``, in one or two sentences with the options of ``sbs-edge annotate``."""
    words, reason = failure.detail, failure.reason
    if reason.startswith("http-3"):
        target = words.removeprefix("the server redirects to ").split("?")[0]
        target = re.sub(r"/(chat/)?completions/?$", "", target)
        if target.startswith("/") and server:
            parts = urlsplit(server)
            target = f"{parts.scheme}://{parts.netloc}{target}"
        return f"A redirect would lose the request: use the address that it points to, --base-url {target}."
    if reason in ("http-401", "http-403", "http-407"):
        return "Check the key (--api-key-env names its variable; --header sends others) and its rights to the model."
    if reason == "http-402" or "insufficient" in words.casefold():
        return "The account has no credit left: top it up, then run the same command."
    if reason == "http-429":
        return "Lower --concurrency, or wait until the limit is refilled."
    if reason in ("thought-only", "cut-off"):
        return (
            "Raise --max-tokens, or switch thinking off where the model can: --request reasoning_effort=low."
        )
    if reason == "rejected":
        return _about_fields(words, set(fields))
    if reason == "http-404" and "response_format" in words:
        return _NOT_STRUCTURED
    if reason == "not-the-protocol" and words.partition("It begins: ")[2].startswith(
        ("data:", "event:", ": ")
    ):
        return "The server streams although it was not asked to: add --extra-body '{\"stream\": false}'."
    if reason in ("http-404", "http-405", "http-410", "not-the-protocol", "not-sent"):
        path = urlsplit(server).path.rstrip("/")
        if server and not re.search(r"/v\d|/openai", path):
            return f"Check the address: most servers answer below /v1, so try --base-url with the path {path}/v1."
        return "Check the address (--base-url, up to and including /v1) and the model's name (--model)."
    if reason in ("connection", "timeout") or reason.startswith(("http-5", "server-error")):
        return "Check that the server runs and answers at this address."
    return ""


_NOT_STRUCTURED = "Ask for plain text with --structured off, or for a function call with --structured tool."


def _about_fields(words: str, fields: set[str]) -> str:
    if "--structured" in fields and any(names_form(words, form) for form in ("json_schema", "tool")):
        return _NOT_STRUCTURED
    if "--structured" not in fields and re.search(r"\btools?\b|function.call", words, re.IGNORECASE):
        return "Ask for a function call with --structured tool."
    if "max_completion_tokens" in words and "max_tokens" in fields:
        return "Add --request max_completion_tokens: the limit is then sent under that name."
    for name in _OPTIONAL:
        if name in fields and re.search(rf"(?<!\w){name}(?!\w)", words):
            return f"Leave the field out with --omit {name}, or set it with --request {name}=VALUE."
    return "Change the request with --request NAME=VALUE, --omit NAME or --extra-body JSON."


_ANSWERS = {
    "empty": "the model wrote nothing; try another model, or form: completion for a base model.",
    "refused": "the model or its filter declined; reword the instruction.",
    "cut-off": "raise max_tokens, ask for a shorter reasoning, or switch thinking off.",
    "thought-only": "the model thought and wrote no answer; raise max_tokens or switch thinking off.",
    "unknown-mark": "the server leaves a template's mark in the text; set its reasoning parser, or name the mark in "
    "thinking_marks or stop.",
    "marker-missing": "the answer lacks answer_marker; add a worked example, or say the marker in format_note.",
    "marker-repeated": "the answer marker stands before two different labels; ask for one answer, at the end.",
    "json-unreadable": "the answer is not valid JSON; ask for plain text with --structured off.",
    "reasoning-missing": "no reasoning came beside the answer; use --rationale-from answer.",
    "summary-missing": "the second call brought no summary; raise max_tokens, and ask again with --retry-failed.",
    "label-unreadable": "no label follows the marker; show the form in a worked example or in format_note.",
    "label-not-in-set": "the model chose outside labels; add the missing label, or list the labels in the instruction.",
    "rationale-missing": "there is no reasoning before the marker; ask for it in format_note.",
    "rationale-too-long": "ask for a shorter reasoning, or raise filters.max_rationale_words.",
    "rationale-contradicts-label": "the reasoning names another label; read it, and reword the instruction.",
    "duplicate-input": "the row repeats an input; remove it from the data.",
    "unanswered": "the server did not answer; run the command again.",
    "rejected": "the server refused the request; see its words above, and --request, --omit, --extra-body.",
}


def advice_on_answer(reason: str) -> str:
    """Return what to change in the task file if answers end with ``reason``."""
    return _ANSWERS.get(reason, "read the answer above, and adjust the task file's filters or wording.")
