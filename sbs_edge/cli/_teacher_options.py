"""Options that ``annotate`` and ``task try`` share: the server, the request, and the reading of the answer."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sbs_edge.teacher.task import TaskFile

__all__ = [
    "ApiKeyEnvOption",
    "BaseUrlOption",
    "ExtraBodyOption",
    "HeaderOption",
    "MaxTokensOption",
    "OmitOption",
    "PriceInOption",
    "PriceOutOption",
    "RationaleFromOption",
    "RequestOption",
    "ServerOption",
    "StructuredOption",
    "TimeoutOption",
    "with_rationale_from",
]


class _Structured(StrEnum):
    """The ways to ask the teacher for a JSON object."""

    auto = "auto"
    on = "on"
    off = "off"
    json_schema = "json_schema"
    json_object = "json_object"
    tool = "tool"


class _RationaleFrom(StrEnum):
    """The sources of a rationale."""

    answer = "answer"
    reasoning = "reasoning"
    summary = "summary"


BaseUrlOption = Annotated[
    str | None,
    typer.Option(
        help="The endpoint up to and including /v1; a query (?api-version=...) is kept. "
        "Default: OPENAI_BASE_URL, the address of --server, or OpenAI's."
    ),
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        help="Preset of a server: openai, azure, openrouter, anthropic, gemini, mistral, deepseek, groq, "
        "together, fireworks, xai, vllm, sglang, llama.cpp, llama-cpp-python, ollama or lmstudio. It sets the "
        "address, the key's variable and parameter names; flags win."
    ),
]
ApiKeyEnvOption = Annotated[
    str | None,
    typer.Option(
        help="Environment variable that holds the key. The key itself is never an option and never written. "
        "Default: OPENAI_API_KEY, or the variable of --server."
    ),
]
HeaderOption = Annotated[
    list[str] | None,
    typer.Option(help="Header sent with every request; NAME=env:VARIABLE keeps a secret out of the shell."),
]
RequestOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Set a field of the request. max_completion_tokens, with or without a value, replaces max_tokens."
    ),
]
OmitOption = Annotated[
    list[str] | None, typer.Option(help="Leave a field out of the request, such as temperature.")
]
ExtraBodyOption = Annotated[str | None, typer.Option(help="JSON object with further fields of the request.")]
TimeoutOption = Annotated[float, typer.Option(min=0.001, help="Seconds to wait for one answer.")]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Longest answer in tokens; an answer that is cut off cannot be used. Default: the task file's.",
    ),
]
PriceInOption = Annotated[float, typer.Option(min=0, help="Money per million prompt tokens.")]
PriceOutOption = Annotated[float, typer.Option(min=0, help="Money per million answer tokens.")]
StructuredOption = Annotated[
    _Structured | None,
    typer.Option(
        help="Ask for a JSON object with rationale and label. auto: if the server supports it; on: fail without support; "
        "tool: as a function call. Default: that of the task file or preset, otherwise auto."
    ),
]
RationaleFromOption = Annotated[
    _RationaleFrom | None,
    typer.Option(
        help="Take the rationale from the answer, from the model's reasoning, or from a summary of the "
        "reasoning by a second call. Default: that of the task file, otherwise answer."
    ),
]


def with_rationale_from(task: TaskFile, flag: str | None) -> TaskFile:
    """Return the task with what ``--rationale-from`` says."""
    from sbs_edge.teacher.task import TaskFile

    return task if flag is None else TaskFile.model_validate({**task.model_dump(), "rationale_from": flag})
