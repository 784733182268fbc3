"""The confidence cascade: answers the student is unsure of are asked of a larger model.

The larger model stands behind any OpenAI-compatible ``/chat/completions``. Its answer is taken only
if it is one of the labels (or, for open tasks, not empty); in every other case, and on any failure
or timeout, the student's own answer stays, marked as abstained. Escalation is bounded: what does
not find a free slot at once is not escalated, so a slow teacher cannot stop the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from sbs_edge.serve.logs import logger

__all__ = ["Escalation"]


class Escalation:
    """Client of one OpenAI-compatible endpoint.

    Args:
        url: base URL, with or without ``/chat/completions``.
        model: model name sent with each call.
        key: bearer token, or ``None``.
        timeout_s: longest time of one call.
        concurrency: most calls at once.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        timeout_s: float = 10.0,
        concurrency: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        base = url.rstrip("/")
        self._url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self._model = model
        self._free = concurrency
        self._client = httpx.AsyncClient(
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            transport=transport,
            trust_env=False,
        )
        self._timeout_s = timeout_s

    async def ask(self, text: str, labels: Sequence[str]) -> tuple[str | None, str]:
        """Return (label or ``None``, result) with result in accepted, unusable, failed, busy."""
        if self._free <= 0:
            return None, "busy"
        self._free -= 1
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.post(self._url, json=self._request(text, labels))
            response.raise_for_status()
            content = response.json()["choices"][0]["message"]["content"]
        except (httpx.HTTPError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
            logger.warning("escalation_failed", error=type(error).__name__)
            return None, "failed"
        finally:
            self._free += 1
        label = match_label(content, labels)
        return label, "accepted" if label is not None else "unusable"

    def _request(self, text: str, labels: Sequence[str]) -> dict[str, Any]:
        if labels:
            system = "Answer with exactly one of these labels and nothing else: " + "; ".join(labels)
        else:
            system = "Answer the question. Reply with the answer only, without an explanation."
        return {
            "model": self._model,
            "temperature": 0,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}],
        }

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def match_label(content: object, labels: Sequence[str]) -> str | None:
    """Return the label the model named, ignoring case and outer space, quotes, stars and full stops."""
    if not isinstance(content, str):
        return None

    def plain(text: str) -> str:
        return text.strip(" \t\r\n\"'`*.").casefold()

    if not labels:
        return content.strip() or None
    for label in labels:
        if content.strip() == label or plain(content) == plain(label):
            return label
    return None
