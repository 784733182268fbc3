"""Structured outputs: the schema of an answer, the fields that ask for it, and the reader of the object.

Each answer is one JSON object ``{"rationale": ..., "label": ...}``. The rationale comes first, so that the model
reasons before it decides. Knows nothing of rows or servers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

from sbs_edge.chat.marks import without_invisible
from sbs_edge.data.raw import printable
from sbs_edge.teacher.task import TaskFile

__all__ = [
    "FORMS",
    "Form",
    "ObjectAnswer",
    "answer_schema",
    "form_fields",
    "names_form",
    "read_object",
]

Form = Literal["off", "json_schema", "json_object", "tool"]
"""The way in which a request asks for the object.

``off``: not at all; the answer is text that ends in the task's marker. ``json_schema``: ``response_format`` of
OpenAI, vLLM, llama.cpp, Ollama and LM Studio. ``json_object``: ``response_format`` of llama-cpp-python, DeepSeek,
Together and Fireworks, which takes the schema beside the type. ``tool``: one function that must be called.
"""

FORMS: tuple[Form, ...] = get_args(Form)

_NAME = "answer"
_LABEL_KEYS = ("label", "answer", "choice")
_RATIONALE_KEYS = ("rationale", "reasoning", "explanation", "reason")
_OBJECT = re.compile(rf'\{{\s*"(?:{"|".join((*_LABEL_KEYS, *_RATIONALE_KEYS))})"\s*:', re.IGNORECASE)
_AROUND = " \t\r\n`[],.;"  # a fence, an array's brackets, a stop
_MOST_OBJECTS = 20  # of one answer that are compared; a model in a loop may write thousands
_DECODER = json.JSONDecoder(strict=False)  # a line break inside a string is accepted


def answer_schema(task: TaskFile) -> dict[str, Any]:
    """Return the JSON schema of an answer; a closed set is an enum.

    Choices are written out as text. An enum of them would be a new schema for each row, which hosted servers compile
    for seconds, and small models write a letter that does not follow from their own rationale.
    """
    label: dict[str, Any] = {"type": "string"}
    if task.labels:
        label["enum"] = list(task.labels)
    return {
        "type": "object",
        "properties": {"rationale": {"type": "string"}, "label": label},
        "required": ["rationale", "label"],
        "additionalProperties": False,
    }


def form_fields(form: str, schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of a request that ask for an object of ``schema``."""
    if form == "off" or schema is None:
        return {}
    if form == "json_object":
        return {"response_format": {"type": "json_object", "schema": dict(schema)}}
    if form == "json_schema":
        wanted = {"name": _NAME, "strict": True, "schema": dict(schema)}
        return {"response_format": {"type": "json_schema", "json_schema": wanted}}
    if form != "tool":
        raise ValueError(f"{form!r} is not a form; settle it first (sbs_edge.teacher.probe)")
    function = {"name": _NAME, "description": "Give the reasoning and the label.", "parameters": dict(schema)}
    return {
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": _NAME}},
    }


def names_form(words: str, form: str) -> bool:
    """Return whether a server's refusal names the fields that ``form`` adds."""
    own = (
        r"\btools?\b|tool_choice|function" if form == "tool" else r"response.?format|json.?(?:schema|object)"
    )
    return re.search(rf"{own}|structured.output|guided|grammar|\bschema\b", words, re.IGNORECASE) is not None


class ObjectAnswer(NamedTuple):
    """The two texts of an answer's object, or the reason why they cannot be read."""

    rationale: str = ""
    label: str | None = None
    reason: str | None = None


def read_object(text: str, *, cut_off: bool = False) -> ObjectAnswer | None:
    """Read the JSON object that an answer consists of, or return None where it is other text.

    A code fence around the object, words before it, a comma too many and a missing last brace are accepted. An
    object inside a longer text is not the answer.

    Args:
        text: the answer, without thought and marks.
        cut_off: whether it ran into its token limit.

    Returns:
        ``reason`` is ``cut-off`` for an object that breaks off, ``json-unreadable`` for one that is not JSON,
        ``marker-repeated`` for several with different labels.

    Example:
        >>> read_object('{"rationale": "Money back is asked for.", "label": "refund"}').label
        'refund'

    """
    first = _OBJECT.search(text)
    if first is None:
        return None
    led = bool(re.sub(r"```(?:json)?", "", text[: first.start()], flags=re.IGNORECASE).strip(_AROUND))
    found, end, problem = _decode(text, first.start())
    if found is None:
        if led:
            return None
        return ObjectAnswer(reason="cut-off" if cut_off or problem == "unfinished" else "json-unreadable")
    rest = text[end:]
    whole = _has(found, _LABEL_KEYS) and _has(found, _RATIONALE_KEYS)
    if led and (rest.strip(_AROUND) or not whole):
        return None
    if cut_off and not whole:
        return ObjectAnswer(reason="cut-off")
    answer = _answer(found)
    for other in islice(_OBJECT.finditer(rest), _MOST_OBJECTS):
        following, _, _ = _decode(rest, other.start())
        if following is not None and _answer(following).label not in (None, answer.label):
            return ObjectAnswer(answer.rationale, reason="marker-repeated")
    return answer


def _decode(text: str, start: int) -> tuple[dict[str, Any] | None, int, str]:
    """Return the object that begins at ``start``, where it ends, and what is wrong where there is none."""
    try:
        found, end = _DECODER.raw_decode(text, start)
        return (found, end, "") if isinstance(found, dict) else (None, start, "other")
    except RecursionError:
        return None, start, "other"
    except ValueError as error:
        at = getattr(error, "pos", start)
        ended = str(error).startswith("Unterminated string") or at >= len(text.rstrip("` \n"))
    body = text[start:].rstrip(_AROUND)
    for repaired in (re.sub(r",\s*([}\]])", r"\1", body), body + "}"):
        try:
            found = _DECODER.decode(repaired)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found, len(text), ""
    return None, start, "unfinished" if ended else "other"


def _answer(found: Mapping[str, Any]) -> ObjectAnswer:
    folded = {str(key).strip().casefold(): value for key, value in found.items()}
    label = _text(next((folded[key] for key in _LABEL_KEYS if key in folded), None))
    rationale = _text(next((folded[key] for key in _RATIONALE_KEYS if key in folded), None))
    return ObjectAnswer(rationale or "", label or None)


def _has(found: Mapping[str, Any], names: Sequence[str]) -> bool:
    return any(str(key).strip().casefold() in names for key in found)


def _text(value: object) -> str | None:
    """Return a value of the object as text on one line; steps in a list are joined."""
    if isinstance(value, bool) or value is None or isinstance(value, dict):
        return None
    if isinstance(value, list):
        parts = [_text(item) for item in value]
        return " ".join(part for part in parts if part) if None not in parts else None
    text = value if isinstance(value, str) else json.dumps(value)
    return printable(" ".join(without_invisible(text).split()))
