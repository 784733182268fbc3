"""Render a task file and a row as a prompt: one text, or a list of chat messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sbs_edge.chat.labels import choice_letter
from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example
from sbs_edge.teacher.structured import answer_schema
from sbs_edge.teacher.task import Shot, TaskFile

__all__ = ["Call", "Prompt", "call_key", "input_text", "render", "show"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The text of a request: ``text`` for a completion, ``messages`` (role, content) for a chat.

    ``schema`` is the JSON schema of the answer, None where it is plain text.
    """

    text: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None

    @property
    def n_chars(self) -> int:
        """Return the length in characters, from which tokens are estimated."""
        schema = len(json.dumps(self.schema)) if self.schema is not None else 0
        return len(self.text or "") + sum(len(content) for _, content in self.messages) + schema

    def as_messages(self) -> list[dict[str, str]]:
        """Return the chat messages in the form of the OpenAI protocol."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the teacher: its key in the journal, the prompt, and the number of the sample."""

    key: str
    prompt: Prompt
    sample: int = 0


def input_text(text: str, choices: Sequence[str] | None) -> str:
    """Return the input with its choices lettered below it, unless it already lists them all."""
    if not choices:
        return text
    lines = [f"({choice_letter(i)}) {choice}" for i, choice in enumerate(choices)]
    if all(line in text for line in lines):
        return text
    return f"{text}\nAnswer Choices:\n" + "\n".join(lines)


def _label_text(task: TaskFile, label: str, choices: Sequence[str] | None) -> str:
    if task.parser == "choice" and choices and label in choices:
        return f"({choice_letter(list(choices).index(label))}) {label}"
    return label


def _answer(task: TaskFile, rationale: str, label: str, choices: Sequence[str] | None) -> str:
    return f"{rationale.strip()} {task.answer_marker} {_label_text(task, label, choices)}."


def _format_note(task: TaskFile) -> str:
    if task.format_note:
        return task.format_note
    example = {
        "label": "the label",
        "choice": "the letter and text of the choice",
        "expression": "the expression",
    }[task.parser]
    note = (
        f"First give your reasoning in one to three sentences. Then end with the words "
        f'"{task.answer_marker}" followed by {example} and a full stop, and write nothing after it.'
    )
    if task.labels:
        note += f" The label is one of: {', '.join(task.labels)}."
    return note


def _object_note(task: TaskFile, form: str) -> str:
    """Say how to answer with the object; a schema that a server ignores is then followed all the same."""
    how = (
        'Answer by calling the function "answer" with'
        if form == "tool"
        else "Answer with one JSON object and nothing else:"
    )
    what = {
        "label": f"one of: {', '.join(task.labels)}" if task.labels else "the label",
        "choice": "the text of the choice, word for word",
        "expression": "the expression",
    }["choice" if task.label_kind == "choices" else task.parser]
    note = f'{how} first "rationale", your reasoning in one to three sentences; then "label", {what}.'
    return f"{task.format_note} {note}".strip()


def _object_answer(shot: Shot) -> str:
    found = {"rationale": shot.rationale.strip(), "label": shot.label}
    return json.dumps(found, ensure_ascii=False)


def _opened(marker: str, question: str) -> str:
    """Put the marker before the input, unless the input begins with it already."""
    return question if question.casefold().startswith(marker.casefold()) else f"{marker} {question}"


def _shots_for(task: TaskFile, row: Example) -> tuple[Shot, ...]:
    own = normalise(row.input)
    return tuple(shot for shot in task.shots if normalise(shot.input) != own)


def render(task: TaskFile, row: Example, form: str = "off") -> Prompt:
    """Return the prompt for ``row``; the gold label is never part of it.

    With a ``form`` of :data:`~sbs_edge.teacher.structured.FORMS` other than ``off``, a chat asks for a JSON object;
    the task's stop texts, which could break it, are left out.

    A worked example with the row's own input is left out of this row's prompt, because it would give the
    teacher the answer.
    """
    shots = _shots_for(task, row)
    question = input_text(row.input, row.choices)
    opening = question[: len(task.input_marker)]
    own = opening if opening.casefold() == task.input_marker.casefold() else task.input_marker
    stop = tuple(dict.fromkeys((f"\n{own}", *task.stop)))
    if task.form == "chat" and form != "off":
        messages = [("system", f"{task.instruction.strip()}\n\n{_object_note(task, form)}")]
        for shot in shots:
            messages.append(("user", input_text(shot.input, shot.choices)))
            messages.append(("assistant", _object_answer(shot)))
        messages.append(("user", question))
        return Prompt(messages=tuple(messages), schema=answer_schema(task))
    if task.form == "chat":
        messages = [("system", f"{task.instruction.strip()}\n\n{_format_note(task)}")]
        for shot in shots:
            messages.append(("user", input_text(shot.input, shot.choices)))
            messages.append(("assistant", _answer(task, shot.rationale, shot.label, shot.choices)))
        messages.append(("user", question))
        return Prompt(messages=tuple(messages), stop=task.stop)
    parts = [task.instruction.strip()]
    if task.labels and not shots:
        parts[0] += f" The label is one of: {', '.join(task.labels)}."
    for shot in shots:
        parts.append(
            f"{_opened(task.input_marker, input_text(shot.input, shot.choices))}\n"
            f"{task.output_marker} {_answer(task, shot.rationale, shot.label, shot.choices)}"
        )
    parts.append(f"{_opened(task.input_marker, question)}\n{task.output_marker}")
    return Prompt(text="\n\n".join(parts), stop=stop)


def call_key(prompt: Prompt, model: str, parameters: dict[str, Any], sample: int = 0) -> str:
    """Return the sha256 (hex) of prompt, model, parameters and sample number.

    Two rows with the same prompt have the same key, so that an equal question is paid for once.
    """
    content = {
        "prompt": prompt.text if prompt.text is not None else prompt.as_messages(),
        "stop": list(prompt.stop),
        "model": model,
        "parameters": parameters,
        "sample": sample,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def show(prompt: Prompt) -> str:
    """Return the prompt as a person reads it: the text, or one block per message, and the answer's schema."""
    if prompt.text is not None:
        return prompt.text
    blocks = [f"[{role}]\n{content}" for role, content in prompt.messages]
    if prompt.schema is not None:
        blocks.append(f"[schema of the answer]\n{json.dumps(prompt.schema, ensure_ascii=False)}")
    return "\n\n".join(blocks)
