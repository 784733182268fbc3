"""Build a teacher and its request parameters from options, task file and server preset."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict

from sbs_edge.chat.endpoint import HIDDEN, holds_hidden, redacted_fields
from sbs_edge.errors import UsageError
from sbs_edge.teacher.calls import Sampling, Teacher
from sbs_edge.teacher.task import RESERVED_FIELDS, Structured, TaskFile

if TYPE_CHECKING:
    from sbs_edge.teacher.annotate import Settings

__all__ = [
    "Server",
    "connect",
    "headers_of",
    "server_preset",
    "servers",
    "shown_extra_body",
    "shown_request",
    "with_request",
]

LIMIT_NAMES = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "n_predict")


class Server(BaseModel):
    """A preset of ``servers.yaml``, which describes the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    key_header: str = "Authorization"
    limit_name: str = "max_tokens"
    omit: tuple[str, ...] = ()
    structured: Structured = "auto"


@cache
def servers() -> Mapping[str, Server]:
    """Return the presets by name."""
    content = yaml.safe_load((files("sbs_edge.teacher") / "servers.yaml").read_text(encoding="utf-8"))
    return {name: Server.model_validate(fields) for name, fields in content.items()}


def server_preset(name: str | None, base_url: str | None = None) -> Server:
    """Return the preset called ``name``, or the defaults for None.

    Raises:
        UsageError: there is no such preset, or it has no address and ``base_url`` is not given.

    """
    if name is None:
        return Server()
    known = {key.casefold().replace(".", ""): value for key, value in servers().items()}
    found = known.get(name.casefold().replace(".", ""))
    if found is None:
        raise UsageError(f"There is no server preset {name!r}; there are {', '.join(servers())}.")
    if not found.base_url and not base_url:
        raise UsageError(
            f"The server preset {name!r} needs base_url, because each account has its own address. For Azure it is "
            "https://NAME.openai.azure.com/openai/deployments/DEPLOYMENT?api-version=VERSION."
        )
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_request(
    sampling: Sampling,
    task: TaskFile,
    server: Server,
    *,
    request: Sequence[str] = (),
    omit: Sequence[str] = (),
    extra_body: str | None = None,
    structured: Structured | None = None,
) -> Sampling:
    """Return ``sampling`` with the fields that arguments, task file and preset set, rename or leave out.

    Arguments win over the task file, and the task file over the preset. A limit under another name replaces
    ``max_tokens``.

    Args:
        sampling: temperature, limit, nucleus and seed.
        task: its ``request``, ``omit`` and ``extra_body`` are used.
        server: the preset.
        request: ``NAME=VALUE``, the value as JSON or else text; a bare limit name renames the limit.
        omit: names of fields that are not sent.
        extra_body: a JSON object.
        structured: how a JSON object is asked for; None: as the task file or the preset says.

    Raises:
        UsageError: a text is of another form, or names a field that has its own flag.

    """
    flags: dict[str, Any] = {}
    for item in request:
        name, equals, value = item.partition("=")
        if not name.strip() or not (equals or name in LIMIT_NAMES):
            raise UsageError(
                "One of the values of request is not NAME=VALUE. Only a limit may have no value: "
                "request=['max_completion_tokens']."
            )
        flags[name.strip()] = _value(value) if equals else None
    if extra_body is not None:
        found = _value(extra_body)
        if not isinstance(found, dict):
            raise UsageError('extra_body must be a JSON object, such as {"reasoning_effort": "low"}.')
        flags = {**found, **flags}
    for name, value in flags.items():
        if holds_hidden(value):
            raise UsageError(
                f"The request's field {name!r} contains {HIDDEN}, because saved configurations leave secrets out. "
                "Give the value again."
            )
        if name in RESERVED_FIELDS or (name == "stream" and value):
            raise UsageError(
                f"The request's field {name!r} cannot be set: it follows from the rows, the model and the samples, "
                "and answers are not streamed."
            )
    extra = {**task.extra_body, **task.request, **flags}
    limit_name, limit = server.limit_name, sampling.max_tokens
    for name in [name for name in extra if name in LIMIT_NAMES]:
        value = extra.pop(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UsageError(f"The limit {name} must be a whole number of tokens above 0, not {value!r}.")
        limit_name, limit = name, value if value is not None else limit
    left_out = dict.fromkeys((*server.omit, *task.omit, *omit))
    return dataclasses.replace(
        sampling,
        max_tokens=limit,
        limit_name=limit_name,
        omit=tuple(name for name in left_out if name not in flags),
        extra=extra,
        structured=_structured(structured, task, server, {*extra, *left_out}),
    )


_OWN_FORM = {
    "response_format", "tools", "tool_choice", "functions", "grammar", "json_schema", "format", "structured_outputs",
    "guided_json", "guided_choice", "guided_regex", "guided_grammar",
}  # fmt: skip
"""Fields with which a user asks for a form of answer, or leaves out the one that would be asked for."""


def _structured(flag: Structured | None, task: TaskFile, server: Server, fields: set[str]) -> Structured:
    """Return how a JSON object is asked for; ``auto`` gives way to the user's own form of answer."""
    wanted = flag or task.structured
    policy = wanted or server.structured
    own = sorted(_OWN_FORM & fields)
    if own or task.form == "completion":
        if wanted not in (None, "auto", "off"):
            reason = f"the request's field {own[0]!r} is set or left out" if own else "form is completion"
            raise UsageError(
                f"Structured outputs ({wanted}) cannot be asked for: {reason} by flags or task file. Take out one."
            )
        return "off"
    return "off" if policy == "auto" and task.format_note else policy


def shown_request(request: Sequence[str]) -> list[str]:
    """Return ``NAME=VALUE`` texts without secrets, to be saved."""
    shown = []
    for item in request:
        name, equals, value = item.partition("=")
        found = _value(value)
        hidden = redacted_fields({name.strip(): found})[name.strip()]
        shown.append(item if hidden == found else f"{name}{equals}{json.dumps(hidden).strip(chr(34))}")
    return shown


def shown_extra_body(extra_body: str) -> str:
    """Return the JSON object without secrets, to be saved."""
    return json.dumps(redacted_fields(_value(extra_body)), ensure_ascii=False)


def headers_of(task: TaskFile, header: Sequence[str] = ()) -> dict[str, str]:
    """Return the task file's headers and those of ``NAME=VALUE`` texts, which win."""
    headers = dict(task.headers)
    for item in header:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(
                "A header is NAME=VALUE, or NAME=env:VARIABLE for a secret (header=['NAME=VALUE'])."
            )
        headers[name.strip()] = value
    return headers


def connect(
    settings: Settings,
    *,
    backend: str = "openai",
    base_url: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    key_header: str = "Authorization",
    headers: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    device: str | None = None,
) -> Teacher:
    """Return the teacher that ``backend`` names: ``openai`` (HTTP) or ``local`` (transformers)."""
    if backend == "openai":
        from sbs_edge.teacher.openai_api import OpenAITeacher

        return OpenAITeacher(
            settings.model,
            base_url,
            api_key_env=api_key_env,
            key_header=key_header,
            headers=headers,
            timeout_seconds=timeout,
        )
    if backend == "local":
        from sbs_edge.teacher.local_model import LocalTeacher

        return LocalTeacher(settings.model, device=device, max_batch=settings.concurrency)
    raise UsageError(f"There is no teacher backend {backend!r}; there are openai and local.")
