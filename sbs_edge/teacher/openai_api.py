"""A teacher behind the OpenAI protocol: hosted, or vLLM, llama.cpp, Ollama, transformers serve.

Uses the ``openai`` package with its own retries switched off: the runner retries, so that every
attempt passes the rate gate and the budget.
"""

from __future__ import annotations

import os
from typing import Any

from sbs_edge.errors import MissingExtra, UsageError
from sbs_edge.teacher.calls import Answer, CallFailed, Sampling
from sbs_edge.teacher.limits import retry_after_seconds
from sbs_edge.teacher.prompt import Prompt

__all__ = ["OpenAITeacher"]

# The server says that no retry will help: the account is empty or the project has no access.
_FATAL_CODES = {"insufficient_quota", "billing_hard_limit_reached", "account_deactivated", "model_not_found"}
_FILTER_CODES = {"content_filter", "content_policy_violation"}


class OpenAITeacher:
    """An async client of one endpoint and one model.

    Args:
        model: the model's name as the server knows it.
        base_url: the endpoint up to and including ``/v1``; None: ``OPENAI_BASE_URL`` or the
            package's default.
        api_key_env: the environment variable that holds the key. Local servers need none.
        timeout_seconds: longest wait for one answer.
        max_connections: as many as there are concurrent calls.

    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_seconds: float = 120.0,
        max_connections: int = 16,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtra("openai", "teacher", "A teacher behind HTTP") from error
        key = os.environ.get(api_key_env)
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        if not key and not base_url:
            raise UsageError(
                f"There is no key for the teacher: set the environment variable {api_key_env}, or give "
                "--base-url for a server that needs none."
            )
        self.model = model
        self._openai = openai
        self._client = openai.AsyncOpenAI(
            api_key=key or "none", base_url=base_url, max_retries=0, timeout=timeout_seconds
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def answer(self, prompt: Prompt, sampling: Sampling, sample: int) -> Answer:
        """Ask once; the caller retries."""
        openai = self._openai
        try:
            raw = await self._send(prompt, sampling.parameters(sample))
            parsed = raw.parse()
        except openai.APIStatusError as error:
            raise self._failure(error) from error
        except openai.APITimeoutError as error:
            raise CallFailed("timeout", str(error), retry=True) from error
        except openai.APIConnectionError as error:
            detail = str(error.__cause__ or error)
            raise CallFailed("connection", detail, retry=True) from error
        except (openai.APIResponseValidationError, ValueError) as error:
            raise CallFailed("not-the-protocol", str(error), retry=True) from error
        return _read(parsed, dict(raw.headers))

    async def _send(self, prompt: Prompt, parameters: dict[str, Any]) -> Any:
        stop = list(prompt.stop) or self._openai.omit
        known = {"temperature", "max_tokens", "top_p", "seed"}
        own = {name: value for name, value in parameters.items() if name in known}
        extra = {name: value for name, value in parameters.items() if name not in known} or None
        if prompt.text is not None:
            return await self._client.completions.with_raw_response.create(
                model=self.model, prompt=prompt.text, stop=stop, extra_body=extra, **own
            )
        return await self._client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=prompt.as_messages(),  # type: ignore[arg-type]
            stop=stop,
            extra_body=extra,
            **own,
        )

    def _failure(self, error: Any) -> CallFailed:
        status, headers = error.status_code, dict(error.response.headers)
        code = str(getattr(error, "code", None) or "")
        detail = f"{error.message}"
        reason = f"http-{status}"
        if code in _FILTER_CODES:
            return CallFailed("refused", detail, headers=headers)
        if status in (401, 402, 403, 404) or code in _FATAL_CODES:
            return CallFailed(reason, detail, fatal=True, headers=headers)
        if status in (408, 409, 425, 429) or status >= 500:
            return CallFailed(
                reason, detail, retry=True, retry_after=retry_after_seconds(headers), headers=headers
            )
        return CallFailed("rejected", f"HTTP {status}: {detail}", headers=headers)


def _read(parsed: Any, headers: dict[str, str]) -> Answer:
    choices = getattr(parsed, "choices", None)
    if not choices:
        raise CallFailed("not-the-protocol", "the response holds no choices", retry=True, headers=headers)
    choice = choices[0]
    message = getattr(choice, "message", None)
    text = message.content if message is not None else choice.text
    usage = getattr(parsed, "usage", None)
    return Answer(
        text=text or "",
        finish_reason=choice.finish_reason,
        prompt_tokens=getattr(usage, "prompt_tokens", None),
        completion_tokens=getattr(usage, "completion_tokens", None),
        refusal=getattr(message, "refusal", None),
        headers=headers,
    )
