"""The task file, which describes the question, the form of the answer, and how it is read.

A task file is YAML. ``sbs-edge task new`` writes one from a data file or a preset. Every field is
checked when it is read, and a wrong field is named with its place. The module knows nothing of HTTP.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sbs_edge import files
from sbs_edge.data.example import LabelKind, TaskSpec
from sbs_edge.errors import DataError

__all__ = [
    "RESERVED_FIELDS",
    "TO_REPLACE",
    "Filters",
    "RationaleFrom",
    "Shot",
    "Structured",
    "TaskFile",
    "parse_task",
    "placeholders",
    "read_task",
    "refuse_placeholders",
    "save_task",
    "yaml_problem",
]

TO_REPLACE = "REPLACE THIS"
"""The beginning of a text that ``task new`` leaves for a person to write."""

RESERVED_FIELDS = ("model", "messages", "prompt", "n")
"""Fields of a request that follow from the rows and the settings."""

_FREE_FIELDS = ("request", "extra_body")  # sent as they are, so numbers must stay numbers

_SECRET_NAME = re.compile(r"auth|key|token|secret|cookie|password", re.IGNORECASE)

Parser = Literal["label", "choice", "expression"]
"""The form of the label after the marker.

``label``: the words up to the end of the line, without a final full stop.
``choice``: a letter in parentheses and the choice's text (``(d) math problem.``), or either alone.
``expression``: an arithmetic expression (``(84 / 2)``), the longest that can be read.
"""


Structured = Literal["auto", "on", "off", "json_schema", "json_object", "tool"]
"""The form in which a server is asked for a JSON object, if at all; see :class:`~sbs_edge.teacher.calls.Sampling`."""

RationaleFrom = Literal["answer", "reasoning", "summary"]
"""The source of a row's rationale."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)  # it may hold a secret


class Shot(_Strict):
    """A worked example: input, rationale, label, and ``choices`` if every row has its own."""

    input: str = Field(min_length=1)
    rationale: str = Field(min_length=1)
    label: str = Field(min_length=1)
    choices: tuple[str, ...] | None = None


class Filters(_Strict):
    """The filters of parsed answers. Every rejection is recorded and counted by its name.

    Attributes:
        label_in_set: the label must be of the closed set, or one of the row's choices.
        leak: refuse a rationale that contains its own label (closed sets and choices). Off by
            default: many honest rationales name the choice they arrive at.
        contradiction: refuse a rationale that names other labels but never its own, or, for
            arithmetic labels, whose last computed value is not the label's value.
        max_rationale_words: refuse longer ones.
        min_rationale_words: refuse shorter ones.
        duplicates: refuse a row whose input an earlier row has.

    """

    label_in_set: bool = True
    leak: bool = False
    contradiction: bool = True
    max_rationale_words: int = Field(default=120, ge=1)
    min_rationale_words: int = Field(default=1, ge=0)
    duplicates: bool = True


class TaskFile(_Strict):
    """The description of a task for the teacher and the parser.

    Attributes:
        name: short name; goes into reports and the student.
        instruction: what to do, in a sentence or two; comes before the worked examples.
        label_kind: ``closed`` (one set, in ``labels``), ``choices`` (each row has its own), ``open``.
        labels: the closed set, in a fixed order.
        compare: ``text`` compares strings, ``value`` compares the values of arithmetic expressions.
        shots: worked examples, in the order they are shown.
        answer_marker: the words between rationale and label, such as ``So the answer is``.
        parser: see :data:`Parser`.
        form: ``completion`` (one text that the model continues) or ``chat`` (a message for each turn).
        input_marker, output_marker: the texts before an input and before its answer in a
            completion; the answer is cut where the next ``input_marker`` begins a line.
        format_note: only for chat; tells the model how to answer. Empty: made from the marker.
        stop: further texts at which the model stops.
        max_tokens: limit of an answer, in the teacher's tokens.
        request: fields of the request to set or rename, such as ``max_completion_tokens``.
        omit: fields of the request that are not sent, such as ``temperature``.
        extra_body: further fields of the request; ``request`` wins.
        headers: further headers; a secret is named as ``env:VARIABLE``.
        structured: whether the server is asked for a JSON object; see :class:`~sbs_edge.teacher.calls.Sampling`.
            None leaves it to the server's preset.
        rationale_from: ``answer`` takes the rationale from the answer, ``reasoning`` the model's reasoning as it
            is, ``summary`` a summary of it that a second call makes.
        thinking_marks: names of further marks around thought, such as ``musing`` for ``<musing>...</musing>``.
        filters: see :class:`Filters`.

    """

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    instruction: str = Field(min_length=1)
    label_kind: LabelKind = "open"
    labels: tuple[str, ...] = ()
    compare: Literal["text", "value"] = "text"
    shots: tuple[Shot, ...] = ()
    answer_marker: str = Field(default="So the answer is", min_length=2)
    parser: Parser = "label"
    form: Literal["completion", "chat"] = "chat"
    input_marker: str = Field(default="Q:", min_length=1)
    output_marker: str = Field(default="A:", min_length=1)
    format_note: str = ""
    stop: tuple[str, ...] = ()
    max_tokens: int = Field(default=256, ge=1)
    request: dict[str, Any] = Field(default_factory=dict)
    omit: tuple[str, ...] = ()
    extra_body: dict[str, Any] = Field(default_factory=dict)
    headers: dict[str, str] = Field(default_factory=dict)
    structured: Structured | None = None
    rationale_from: RationaleFrom = "answer"
    thinking_marks: tuple[str, ...] = ()
    filters: Filters = Filters()

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        plain = [label.strip().casefold() for label in labels]
        if len(set(plain)) != len(plain) or "" in plain:
            raise ValueError("labels must be distinct and not empty")
        return labels

    @field_validator("request", "extra_body")
    @classmethod
    def _own_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name, value in fields.items():
            if name in RESERVED_FIELDS or (name == "stream" and value):
                raise ValueError(f"the field {name!r} is made from the rows and the flags")
        return fields

    @field_validator("headers")
    @classmethod
    def _no_secret(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if _SECRET_NAME.search(name) and not value.startswith("env:"):
                raise ValueError(
                    f"the header {name!r} looks like a secret, and task files are passed on: write env:VARIABLE and "
                    "set that variable"
                )
        return headers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.label_kind == "closed") != bool(self.labels):
            raise ValueError("labels must be given for label_kind 'closed', and only there")
        if self.parser == "choice" and self.label_kind != "choices":
            raise ValueError("parser 'choice' needs label_kind 'choices'")
        if self.compare == "value" and self.parser != "expression":
            raise ValueError("compare 'value' needs parser 'expression'")
        for number, shot in enumerate(self.shots, 1):
            if self.label_kind == "closed" and shot.label not in self.labels:
                raise ValueError(f"shot {number} has the label {shot.label!r}, which is not in labels")
            if self.label_kind == "choices" and shot.label not in (shot.choices or ()):
                raise ValueError(f"shot {number} must have its label {shot.label!r} among its choices")
            if self.answer_marker.casefold() in shot.rationale.casefold():
                raise ValueError(f"shot {number} has the answer marker inside its rationale")
        return self

    @property
    def spec(self) -> TaskSpec:
        """Return the part that the student must know."""
        return TaskSpec(self.name, self.label_kind, self.labels, self.compare)


def parse_task(content: Any, where: str) -> TaskFile:
    """Check a mapping from YAML or JSON; ``where`` names it in errors."""
    if not isinstance(content, dict):
        raise DataError(f"{where} must hold a mapping of fields; 'sbs-edge task new' writes one.")
    try:
        return TaskFile.model_validate(content)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(str(part) for part in item["loc"]) or "the file as a whole"
            problems.append(f"{place}: {re.sub('^Value error, ', '', item['msg'])}")
        raise DataError(
            f"{where} is not a valid task file: {'; '.join(problems)}. The fields are described in docs/teacher.md."
        ) from error


def placeholders(task: TaskFile) -> list[str]:
    """Return the fields that still contain :data:`TO_REPLACE`, such as ``shots.1.rationale``."""
    texts = {"instruction": task.instruction, "format_note": task.format_note}
    texts |= {f"shots.{number}.rationale": shot.rationale for number, shot in enumerate(task.shots)}
    return [name for name, text in texts.items() if text.lstrip().startswith(TO_REPLACE)]


def refuse_placeholders(task: TaskFile, where: str | Path) -> None:
    """Raise :class:`DataError` for an unfinished task file, because its answers would be paid for and useless."""
    if left := placeholders(task):
        raise DataError(
            f"{where} is not finished: {', '.join(left)} still say(s) {TO_REPLACE!r}. Open the file and write what "
            "is asked, and why each worked example has its label; or take examples out."
        )


def _resolvers(*kinds: str) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the library's rules for plain scalars of these types; other scalars are text."""
    return {
        first: [(tag, pattern) for tag, pattern in found if tag.rsplit(":", 1)[-1] in kinds]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class TextLoader(yaml.SafeLoader):
    """A loader that keeps scalars as text: YAML 1.1 would read the label ``no`` as False, and fields have types."""

    yaml_implicit_resolvers = _resolvers("null", "merge")


def yaml_problem(error: Exception) -> str:
    """Return place and problem of a YAML error on one line, without its quotation of the file, which may be a secret."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark and problem else str(error)


class _JsonLoader(yaml.SafeLoader):
    """A loader of the types that JSON has, for the fields of a request; a date stays text."""

    yaml_implicit_resolvers = _resolvers("null", "merge", "bool", "int", "float")


def read_task(path: Path) -> TaskFile:
    """Read a task file.

    Raises:
        OSError: the file cannot be read.
        DataError: the file is not YAML, or a field is wrong; the message names it.

    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, TextLoader)  # noqa: S506 (a safe loader)
        if isinstance(content, dict) and not content.keys().isdisjoint(_FREE_FIELDS):
            typed = yaml.load(text, _JsonLoader)  # noqa: S506 (a safe loader)
            content |= {name: typed[name] for name in _FREE_FIELDS if name in content}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"The task file {path} is not valid YAML: {yaml_problem(error)}.") from None
    return parse_task(content, str(path))


_HEADER = """\
# What the teacher is asked and how its answer is read. Check with:
#   sbs-edge annotate INPUT --task THIS_FILE --show-prompt
"""


class _Dumper(yaml.SafeDumper):
    """A dumper with block style for texts of several lines."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def save_task(task: TaskFile, path: Path) -> None:
    """Write ``task`` as YAML that :func:`read_task` reads back to an equal value."""
    content = task.model_dump(mode="json", exclude_none=True)
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    files.write_text(path, _HEADER + text)
