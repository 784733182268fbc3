"""Generate options from the fields of a configuration class, and parse ``FIELD=VALUE``."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sbs_edge.cli._suggest import suggested
from sbs_edge.errors import UsageError

__all__ = ["field_options", "parse_fields"]


def field_options(
    model: type[BaseModel], before: str, flags: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that gives a command an option for each described field of ``model``.

    The command receives the options in its ``**`` parameter. Names, bounds, choices, defaults and help
    come from the fields.

    Args:
        model: configuration class; a field without a description gets no option.
        before: parameter of the command before which the options are placed.
        flags: fields whose option has another name, and that name.

    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name == before:
                parameters += [
                    _parameter((flags or {}).get(field, field), info)
                    for field, info in model.model_fields.items()
                    if info.description
                ]
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                parameters.append(
                    parameter.replace(annotation=hints[name], kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
                )
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in parameters}
        return command

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    default = field.default
    kind, repeated, optional = _kind(name, field.annotation)
    # A flag that is off by default needs no opposite; typer gives one to the others.
    names = [f"--{name.replace('_', '-')}"] if kind is not bool or default is False else []
    if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(default, str):
        default = kind(default)
    annotation: Any = list[kind] if repeated else kind  # type: ignore[valid-type]
    if optional:
        annotation = annotation | None
    option = typer.Option(*names, help=field.description, **_bounds(field, kind))
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=default,
        annotation=Annotated[annotation, option],
    )


def _kind(name: str, annotation: Any) -> tuple[Any, bool, bool]:
    """Return the type of a value, whether several may be given, and whether None is allowed."""
    optional = repeated = False
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is typing.Union:
        parts = get_args(annotation)
        optional = type(None) in parts
        annotation = next(part for part in parts if part is not type(None))
    if get_origin(annotation) is tuple:
        repeated, annotation = True, get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        values = [*get_args(annotation), *(["none"] if repeated else [])]
        make: Any = StrEnum  # the functional form, whose name mypy wants as a literal
        annotation = make(name, {value.replace("-", "_"): value for value in values})
    return annotation, repeated, optional


def _bounds(field: FieldInfo, kind: Any) -> dict[str, Any]:
    """Return the closed bounds of a number; pydantic itself checks open ones."""
    if kind not in (int, float):
        return {}
    found: dict[str, Any] = {}
    for item in field.metadata:
        for low in ("ge", "gt"):
            if getattr(item, low, None) is not None:
                found["min"] = getattr(item, low)
        for high in ("le", "lt"):
            if getattr(item, high, None) is not None:
                found["max"] = getattr(item, high)
    assert all(math.isfinite(bound) for bound in found.values())
    return found


def parse_fields(
    items: Iterable[str], model: type[BaseModel], flags: Mapping[str, str], option: str = "--training"
) -> dict[str, Any]:
    """Read ``FIELD=VALUE`` texts; the configuration class converts and checks the values.

    Args:
        items: the texts; ``null`` means None, every other value is text as written.
        model: configuration class.
        flags: fields that the command sets with another option, and that option.
        option: option that received the texts, for messages.

    Raises:
        UsageError: a text is not FIELD=VALUE, names an unknown field or names one twice.

    """
    found: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"{option} takes FIELD=VALUE, for example d_model=128; found {item!r}.")
        if name in flags:
            raise UsageError(f"{option} cannot set {name}: use {flags[name]} for it.")
        if name not in model.model_fields:
            near = suggested(name, model.model_fields)
            hint = (
                f"Did you mean {' or '.join(near)}?" if near else f"Fields: {', '.join(model.model_fields)}."
            )
            raise UsageError(f"{option} {item}: {name} is not a field of the training configuration. {hint}")
        if name in found:
            raise UsageError(f"{option} sets {name} twice. Leave one out.")
        found[name] = None if value == "null" else value
    return found
