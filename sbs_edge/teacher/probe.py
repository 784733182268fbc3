"""Settle how a server is asked for a JSON object: by one request, whose answer decides for the whole run.

The decision goes into the journal as a note, so that a run that is resumed asks as the first one did: another form
is another request, and every row would be paid for twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sbs_edge.chat.marks import unmark
from sbs_edge.teacher.journal import Journal, Record
from sbs_edge.teacher.prompt import Call
from sbs_edge.teacher.stop import TeacherUnavailableError
from sbs_edge.teacher.structured import FORMS, Form, names_form, read_object
from sbs_edge.teacher.task import Structured

__all__ = ["CANDIDATES", "PROBED_ROWS", "Settled", "form_from_notes", "needs_probe", "settle_form"]

PROBED_ROWS = 3
"""The largest number of rows that are asked, if answers decide nothing, such as thought without an answer."""

CANDIDATES: tuple[Form, ...] = ("json_schema", "json_object")
"""Forms that are tried, in this order."""

_IGNORED = "the server ignores response_format and the model answered with other text"

CallsOf = Callable[[Form], Sequence[Call]]
"""A function that returns the calls of the first :data:`PROBED_ROWS` rows in one form."""

AskOne = Callable[[Call, Form], Coroutine[Any, Any, None]]
"""A function that asks for one call; its record is in the journal afterwards, unless it stayed unanswered."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The form of a run.

    Attributes:
        form: how its requests ask.
        refusal: the server's words about the forms that it does not take, or None.
        probes: journal keys of the requests that settled it; they are paid for, whatever came of them.

    """

    form: Form
    refusal: str | None = None
    probes: tuple[str, ...] = ()


def needs_probe(policy: Structured) -> bool:
    """Return whether the policy leaves the form to the server."""
    return policy in ("auto", "on")


def _note(model: str) -> str:
    return f"structured {model}"


def form_from_notes(policy: Structured, notes: Mapping[str, str], model: str) -> Settled | None:
    """Return what an earlier run settled for ``model``, or None; a policy that is a form settles itself."""
    if not needs_probe(policy):
        return Settled(next(form for form in FORMS if form == policy))
    try:
        found = json.loads(notes[_note(model)])
        form = next(form for form in FORMS if form == found["form"])
        settled = Settled(form, found["refusal"], tuple(map(str, found["probes"])))
    except (KeyError, TypeError, ValueError, StopIteration):
        return None
    return None if policy == "on" and form == "off" else settled


async def settle_form(
    policy: Structured,
    model: str,
    journal: Journal,
    calls_of: CallsOf,
    ask_one: AskOne,
    *,
    has_plain: Callable[[], bool] = lambda: False,
    marks: Sequence[str] = (),
) -> Settled:
    """Return the form in which ``model`` is asked, from the journal or by asking.

    A journal that holds plain answers to these rows keeps to the plain form under ``auto``. A server refuses a form
    with words that name it, or by answering the same row in the plain form. A server that answers with other text
    than the object ignores it.

    Args:
        policy: see :class:`~sbs_edge.teacher.calls.Sampling`.
        model: the teacher's model.
        journal: open journal; the decision is noted in it.
        calls_of: see :data:`CallsOf`.
        ask_one: see :data:`AskOne`.
        has_plain: whether the journal holds a plain answer to one of the rows.
        marks: the task's own names of marks around thought.

    Raises:
        TeacherUnavailableError: the policy is ``on`` and the server takes no form, or it cannot be used at all.

    """
    known = form_from_notes(policy, journal.notes, model)
    if known is not None:
        return known
    if policy == "auto" and journal.records and has_plain():
        return Settled("off")
    settled, is_final = await _Probe(journal, calls_of, ask_one, marks).run()
    if policy == "on" and settled.form == "off":
        if not is_final:  # nothing answered: the run's own requests say why
            return Settled(CANDIDATES[0], None, settled.probes)
        words = (settled.refusal or _IGNORED).rstrip(". ")
        raise TeacherUnavailableError(
            f"The teacher {model!r} does not give the JSON object that structured='on' requires: {words}. For plain "
            "answers use structured='auto', or try structured='tool'."
        )
    if is_final:
        content = {"form": settled.form, "refusal": settled.refusal, "probes": settled.probes}
        journal.note(_note(model), json.dumps(content, ensure_ascii=False))
    return settled


def _answered(record: Record | None) -> bool:
    return record is not None and not record.is_refusal


@dataclass(slots=True)
class _Probe:
    journal: Journal
    calls_of: CallsOf
    ask_one: AskOne
    marks: Sequence[str]

    async def run(self) -> tuple[Settled, bool]:
        """Return what is settled, and whether the server's answers say so for good."""
        asked: list[str] = []
        refusal: str | None = None
        for form in CANDIDATES:
            verdict, words, keys = await self._form(form)
            asked += keys
            refusal = refusal or words
            if verdict == "works":
                return Settled(form, None, tuple(asked)), True
            if verdict != "refused":
                return Settled("off", refusal, tuple(asked)), verdict == "ignored"
        return Settled("off", refusal, tuple(asked)), True

    async def _form(self, form: Form) -> tuple[str, str | None, list[str]]:
        keys: list[str] = []
        for call, plain in zip(self.calls_of(form), self.calls_of("off"), strict=True):
            keys.append(call.key)
            record = await self._record(call, form)
            if record is not None and not record.is_refusal and record.error is None:
                verdict = self._verdict(record)
                if verdict != "unclear":
                    return verdict, _IGNORED if verdict == "ignored" else None, keys
            elif record is None or record.is_refusal:
                words = record.error if record is not None else None
                if words is not None and names_form(words, form):
                    return "refused", words, keys
                keys.append(plain.key)
                if _answered(await self._record(plain, "off")):
                    return "refused", words or "the request stayed unanswered", keys
                return "unclear", words, keys  # the plain form is refused too: the form is not the cause
        return "unclear", None, keys

    async def _record(self, call: Call, form: Form) -> Record | None:
        if not _answered(found := self.journal.records.get(call.key)):
            try:
                await self.ask_one(call, form)
            except TeacherUnavailableError as error:
                words = error.failure.detail if error.failure is not None else ""
                if form == "off" or not names_form(words, form):
                    raise
                return Record(call.key, "", error=f"rejected: {words}")
            found = self.journal.records.get(call.key)
        return found

    def _verdict(self, record: Record) -> str:
        body = unmark(record.text, names=self.marks)
        cut_off = record.finish_reason == "length"
        found = read_object(body.text, cut_off=cut_off)
        if found is not None and found.reason != "json-unreadable":
            return "works"
        return "unclear" if body.reason is not None or not body.text or cut_off else "ignored"
