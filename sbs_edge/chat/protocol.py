"""Read responses of the OpenAI protocol: a typed answer, or a failure in the server's own words.

Responses of servers, Batch files and proxies are untrusted JSON. :func:`read_answer` takes only the text out of it and
rejects every other shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from sbs_edge.chat.answer import Answer, CallFailed
from sbs_edge.chat.endpoint import one_line
from sbs_edge.chat.logprobs import read_logprobs

__all__ = ["content_text", "failure", "parse_body", "read_answer", "reasoning_text", "token_count"]

# The server says that a retry will not help: the account is empty or the project has no access.
_FATAL_CODES = {"insufficient_quota", "billing_hard_limit_reached", "account_deactivated", "model_not_found"}
_FILTER_CODES = {"content_filter", "content_policy_violation"}
_FATAL = {401, 402, 403, 404, 405, 407, 410}
_AGAIN = {408, 409, 424, 425, 429}  # 424: text-generation-inference failed while generating
_FINISH = {
    "max_tokens": "length", "model_length": "length", "max_output_tokens": "length",
    "safety": "content_filter", "recitation": "content_filter", "prohibited_content": "content_filter",
    "tool_calls": "stop", "function_call": "stop",
}  # fmt: skip
_QUOTED = 4000  # characters; the caller removes secrets first, then cuts further
_THOUGHT_PARTS = {"thinking", "reasoning", "redacted_thinking", "thought", "reasoning_content"}


def content_text(content: object) -> str:
    """Return the text of a message's ``content``: a text, null, or a list of parts, without thinking.

    Raises:
        ValueError: any other shape.

    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"its content is of type {type(content).__name__}, not text")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict):
            raise ValueError(f"a part of its content is of type {type(part).__name__}")
        elif part.get("type") in _THOUGHT_PARTS or part.get("thought") is True:
            continue
        elif part.get("type") in ("text", "output_text", None) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f"a part of its content is of the type {one_line(str(part.get('type')), 40)!r}")
    return "".join(texts)


def reasoning_text(message: Mapping[str, Any]) -> str:
    """Return the reasoning that a server keeps apart from the answer, or an empty text.

    Servers name the field ``reasoning_content``, ``reasoning``, ``thinking`` or ``reasoning_details``, or send parts
    of ``content`` with the type ``thinking``.

    Example:
        >>> reasoning_text({"content": "refund", "reasoning_content": "Money back is asked for."})
        'Money back is asked for.'

    """
    for name in ("reasoning_content", "reasoning", "thinking", "reasoning_details"):
        if found := _joined(message.get(name)).strip():
            return found
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    thought = [
        part
        for part in parts
        if isinstance(part, dict) and (part.get("type") in _THOUGHT_PARTS or part.get("thought") is True)
    ]
    return _joined(thought).strip()


def _joined(value: object, depth: int = 0) -> str:
    """Return the texts of a field that may be a text, an object with one, or a list of either."""
    if isinstance(value, str):
        return value
    if depth > 4:
        return ""
    if isinstance(value, list):
        return "".join(_joined(item, depth + 1) for item in value)
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "summary", "content")
        return next((text for name in names if (text := _joined(value.get(name), depth + 1))), "")
    return ""


def _arguments(message: Mapping[str, Any]) -> str:
    """Return the arguments of the first function call as JSON text, or an empty text."""
    calls = message.get("tool_calls")
    listed = (
        [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    )
    for called in (*listed, message.get("function_call")):
        arguments = called.get("arguments") if isinstance(called, dict) else None
        if isinstance(arguments, dict):  # some servers send the object itself
            return json.dumps(arguments, ensure_ascii=False)
        if isinstance(arguments, str) and arguments.strip():
            return arguments
    return ""


def token_count(value: object) -> int | None:
    """Return a number of tokens, or None for anything else, because servers send texts, floats and -1."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 16:
        value = int(value)
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        return None
    return value


def _word(value: object) -> str | None:
    return value if isinstance(value, str) else None


_Text = Annotated[str, BeforeValidator(content_text)]
_Count = Annotated[int | None, BeforeValidator(token_count)]
_Word = Annotated[str | None, BeforeValidator(_word)]


class _Foreign(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


class _Message(_Foreign):
    content: _Text = ""
    refusal: Any = None


class _Choice(_Foreign):
    message: _Message | None = None
    text: _Text | None = None
    finish_reason: _Word = None
    error: Any = None
    logprobs: Any = None


class _Usage(_Foreign):
    prompt_tokens: _Count = None
    completion_tokens: _Count = None


class _Response(_Foreign):
    choices: list[_Choice]
    model: _Word = None
    usage: Annotated[_Usage, BeforeValidator(lambda v: v if isinstance(v, dict) else {})] = _Usage()


def parse_body(content: bytes) -> Any:
    """Return the JSON of a body, or None if it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def read_answer(body: Any, headers: Mapping[str, str] | None = None, raw: str = "") -> Answer:
    """Read the JSON body of a response that came with status 200.

    Args:
        body: the parsed JSON; None where the body was not JSON.
        headers: the response's headers.
        raw: the body's beginning as text, quoted where it is not JSON.

    Raises:
        CallFailed: the body is an error or of another shape; the message quotes it.

    """
    if isinstance(body, dict) and not body.get("choices") and (found := _error_of(body)):
        words, code, status = found
        if status or code:
            raise failure(status or 200, body, headers, raw)
        raise CallFailed(
            "not-the-protocol", f"the server answered with an error: {words}", retry=True, headers=headers
        )
    try:
        response = _Response.model_validate(body)
        if not response.choices:
            raise ValueError("it holds no choices")
        choice = response.choices[0]
        if choice.error:
            words, _, status = _error_of({"error": choice.error}) or ("an error", "", None)
            raise CallFailed("server-error", words, retry=True, headers=headers)
        if choice.message is None and choice.text is None:
            raise ValueError(f"its choice holds no message (finish_reason {choice.finish_reason})")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        problem = f"{place}: {first['msg'].removeprefix('Value error, ')}"
        raise _foreign(problem, body, raw, headers) from None
    except ValueError as error:
        raise _foreign(str(error), body, raw, headers) from None
    finish = (choice.finish_reason or "").casefold()
    if finish == "error":
        raise CallFailed(
            "server-error",
            "the server broke off its answer (finish_reason error)",
            retry=True,
            headers=headers,
        )
    message = choice.message or _Message()
    sent: dict[str, Any] = body["choices"][0].get("message") or {}
    content = message.content if choice.message is not None else choice.text or ""
    return Answer(
        text=_arguments(sent) or content,
        finish_reason=_FINISH.get(finish, choice.finish_reason),
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        refusal=one_line(
            message.refusal if isinstance(message.refusal, str) else json.dumps(message.refusal), _QUOTED
        )
        if message.refusal
        else None,
        reasoning=reasoning_text(sent),
        model=response.model,
        headers=headers or {},
        top_logprobs=read_logprobs(choice.logprobs),
    )


def _foreign(problem: str, body: Any, raw: str, headers: Mapping[str, str] | None) -> CallFailed:
    shown = one_line(raw or json.dumps(body, ensure_ascii=False), _QUOTED) or "nothing"
    if body is None:
        problem = "it is not JSON"
    return CallFailed(
        "not-the-protocol",
        f"the response is not of the protocol: {problem}. It begins: {shown}",
        retry=True,
        headers=headers,
    )


def _error_of(body: Any) -> tuple[str, str, int | None] | None:
    """Return (words, code, status) of an error in any of the shapes servers use, or None."""
    if not isinstance(body, dict):
        return None
    found = body.get("error") or body.get("errors") or body.get("detail")
    if not found and (body.get("object") == "error" or "message" in body):
        found = body
    if not found:
        return None
    if isinstance(found, list) and found:
        found = found[0]
    if not isinstance(found, dict):
        return one_line(found if isinstance(found, str) else json.dumps(found), _QUOTED), "", None
    code = found.get("code") or found.get("type") or ""
    status = token_count(found.get("code")) or token_count(found.get("status"))
    inner = found.get("message") or found.get("msg") or found.get("detail") or found
    words = inner if isinstance(inner, str) else json.dumps(inner)
    details = found.get("metadata")
    if isinstance(details, dict) and isinstance(details.get("raw"), str):
        words += f": {details['raw']}"
    return one_line(words, _QUOTED), str(code), status if status is not None and 400 <= status < 600 else None


def failure(status: int, body: Any, headers: Mapping[str, str] | None = None, raw: str = "") -> CallFailed:
    """Return the failure for a response with an error ``status``, or with an error in a 200.

    Args:
        status: of the response, or the one its body names.
        body: the parsed JSON, or None.
        headers: the response's headers, names in lower case.
        raw: the body's beginning as text, quoted where its JSON holds no message.

    """
    headers = headers or {}
    words, code, _ = _error_of(body) or (one_line(raw, _QUOTED) or "no further words", "", None)
    if code.casefold() in _FILTER_CODES:
        return CallFailed("refused", words, headers=headers)
    if 300 <= status < 400:
        return CallFailed(
            f"http-{status}",
            f"the server redirects to {one_line(headers.get('location', 'nowhere'), _QUOTED)}",
            fatal=True,
            headers=headers,
        )
    if status in _FATAL or code in _FATAL_CODES:
        return CallFailed(f"http-{status}", words, fatal=True, headers=headers)
    if status in _AGAIN or status >= 500:
        return CallFailed(f"http-{status}", words, retry=True, headers=headers)
    return CallFailed("rejected", f"HTTP {status}: {words}", headers=headers)
