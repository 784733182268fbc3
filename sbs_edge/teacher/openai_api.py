"""A teacher behind the OpenAI protocol: hosted, or vLLM, llama.cpp, Ollama, transformers serve.

Each call sends one request. The runner retries, so that every attempt passes the rate gate and the budget.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Mapping

from sbs_edge.chat.endpoint import Endpoint, secret_values
from sbs_edge.chat.protocol import failure, parse_body, read_answer
from sbs_edge.errors import MissingExtra, UsageError
from sbs_edge.teacher.calls import Answer, CallFailed, Sampling, request_body
from sbs_edge.teacher.prompt import Prompt

__all__ = ["OpenAITeacher", "endpoint_of"]

DEFAULT_URL = "https://api.openai.com/v1"
_QUOTED_BYTES = 4000


def endpoint_of(
    base_url: str | None,
    *,
    api_key_env: str = "OPENAI_API_KEY",
    key_header: str = "Authorization",
    headers: Mapping[str, str] | None = None,
) -> Endpoint:
    """Return the endpoint from arguments and environment.

    Raises:
        UsageError: there is neither an address nor a key, or one of them cannot be used.

    """
    key = (os.environ.get(api_key_env) or "").strip()
    url, origin = base_url, "--base-url"
    if not url and (url := (os.environ.get("OPENAI_BASE_URL") or "").strip()):
        origin = "The environment variable OPENAI_BASE_URL"
    if not url and not key:
        raise UsageError(
            f"There is no key for the teacher: set the environment variable {api_key_env}, or give base_url for a "
            "server that needs none."
        )
    return Endpoint.of(
        url or DEFAULT_URL,
        origin=origin,
        key=key,
        key_origin=api_key_env,
        key_header=key_header,
        headers=headers,
    )


class OpenAITeacher:
    """An async client of an endpoint and a model.

    Args:
        model: the model's name as the server knows it.
        base_url: the endpoint up to and including ``/v1``; None: ``OPENAI_BASE_URL`` or OpenAI's own.
        api_key_env: the environment variable that holds the key. Local servers need none.
        key_header: the header with the key.
        headers: further headers, name -> value.
        timeout_seconds: longest wait for an answer.

    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        key_header: str = "Authorization",
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = 120.0,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise MissingExtra("httpx", "teacher", "A teacher behind HTTP") from error
        self.model = model
        self.endpoint = endpoint_of(base_url, api_key_env=api_key_env, key_header=key_header, headers=headers)
        self.timeout_seconds = timeout_seconds
        self._httpx = httpx
        self._client = httpx.AsyncClient(
            timeout=timeout_seconds,
            headers=dict(self.endpoint.headers),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def answer(self, prompt: Prompt, sampling: Sampling, sample: int) -> Answer:
        """Ask once; the caller retries."""
        endpoint = self.endpoint.hiding(secret_values(sampling.extra))
        httpx, clean = self._httpx, endpoint.clean
        route, body = request_body(prompt, self.model, sampling, sample)
        try:
            async with asyncio.timeout(self.timeout_seconds):
                response = await self._client.post(self.endpoint.url(route), json=body)
        except (TimeoutError, httpx.TimeoutException):
            detail = f"no answer within {self.timeout_seconds:g} s (--timeout)"
            raise CallFailed("timeout", detail, retry=True) from None
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            # Its message would quote the header or the address.
            raise CallFailed("not-sent", type(error).__name__, fatal=True) from None
        except httpx.DecodingError:
            raise CallFailed("not-the-protocol", "the body cannot be decompressed", retry=True) from None
        except httpx.HTTPError as error:
            detail = clean(f"{type(error).__name__}: {error}")
            raise CallFailed("connection", detail, retry=True) from None
        headers = dict(response.headers)
        raw = response.content[:_QUOTED_BYTES].decode("utf-8", "replace")
        try:
            if response.status_code != 200:
                raise failure(response.status_code, parse_body(response.content), headers, raw)
            answer = read_answer(parse_body(response.content), headers, raw)
            text = endpoint.hide(answer.text)
            kept = answer.top_logprobs if text == answer.text else ()  # tokens spell out what was hidden
            return dataclasses.replace(
                answer,
                text=text,
                finish_reason=answer.finish_reason and clean(answer.finish_reason),
                refusal=answer.refusal and clean(answer.refusal, 500),
                reasoning=endpoint.hide(answer.reasoning),
                top_logprobs=kept,
            )
        except CallFailed as failed:
            raise failed.reworded(clean(failed.detail, 500)) from None
