"""Escalation: ask a larger model about the texts on which the student abstains.

The larger model is any OpenAI-compatible ``/chat/completions``. Its answer is parsed as ``annotate`` parses it, and
accepted only if it is one of the labels (for open tasks: if it is complete and not empty). In every other case, and
on any failure or timeout, the student's answer stays, marked as abstained. The number of calls is bounded: a text
that finds no free call at once is not escalated, so a slow model cannot stop the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from sbs_edge.chat.answer import Answer, CallFailed
from sbs_edge.chat.endpoint import Endpoint
from sbs_edge.chat.labels import match_label, plain_label
from sbs_edge.chat.marks import unmark
from sbs_edge.chat.protocol import failure, parse_body, read_answer
from sbs_edge.serve.logs import logger

__all__ = ["Escalation", "label_of"]


class Escalation:
    """Client of one OpenAI-compatible endpoint.

    Args:
        url: base URL, with or without ``/chat/completions``; a query is kept.
        model: model name sent with each call.
        key: bearer token, or ``None``.
        timeout_s: longest time of a call.
        concurrency: most calls at once.
        transport: replaces the network in tests.

    Raises:
        UsageError: the address or the key is not usable.
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
        endpoint = Endpoint.of(
            url, origin="--escalate-url", key=key, key_origin="SBS_EDGE_SERVE_ESCALATE_KEY"
        )
        self._url = endpoint.url("/chat/completions")
        self._model = model
        self._free = concurrency
        self._client = httpx.AsyncClient(
            timeout=timeout_s, headers=dict(endpoint.headers), transport=transport, trust_env=False
        )
        self._timeout_s = timeout_s

    async def ask(self, text: str, labels: Sequence[str]) -> tuple[str | None, str]:
        """Return a label or ``None``, and the result: accepted, unusable, failed or busy."""
        if self._free <= 0:
            return None, "busy"
        self._free -= 1
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._client.post(self._url, json=self._request(text, labels))
            body = parse_body(response.content)
            if response.status_code != 200:
                raise failure(response.status_code, body)
            answer = read_answer(body)
        except CallFailed as failed:  # the message may quote the text
            logger.warning("escalation_failed", error=failed.reason)
            return None, "failed"
        except (httpx.HTTPError, TimeoutError) as error:
            logger.warning("escalation_failed", error=type(error).__name__)
            return None, "failed"
        finally:
            self._free += 1
        label = label_of(answer, labels)
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


def label_of(answer: Answer, labels: Sequence[str]) -> str | None:
    """Return the label in a complete answer, or ``None``.

    Args:
        answer: the answer of the larger model.
        labels: the labels to choose from; empty for an open task, whose answer may be any text.
    """
    body, reason, ended, _ = unmark(answer.text, labels)
    cut_off = answer.finish_reason == "length" and not ended
    if reason is not None or answer.refusal or answer.finish_reason == "content_filter" or cut_off:
        return None
    if labels:
        return match_label(body, labels)
    return plain_label(body) or None
