"""Pace: what the server says about its limits, and how long to wait before trying again.

Knows nothing of the openai package; it reads header mappings and numbers.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime

__all__ = ["RateGate", "backoff_seconds", "duration_seconds", "retry_after_seconds"]

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
MAX_WAIT_SECONDS = 3600.0


def duration_seconds(text: str | None) -> float | None:
    """Read ``6m0s``, ``120ms``, ``1.5`` (seconds) or an ISO 8601 time; None for anything else."""
    if not text:
        return None
    plain = text.strip()
    try:
        return max(0.0, float(plain))
    except ValueError:
        pass
    parts = _PART.findall(plain)
    if parts and "".join(number + unit for number, unit in parts) == plain:
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    try:
        moment = datetime.fromisoformat(plain)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return what ``Retry-After`` (seconds or a date) or ``retry-after-ms`` asks for."""
    milliseconds = headers.get("retry-after-ms")
    if milliseconds is not None:
        try:
            return min(MAX_WAIT_SECONDS, max(0.0, float(milliseconds) / 1e3))
        except ValueError:
            pass
    value = headers.get("retry-after")
    if value is None:
        return None
    seconds = duration_seconds(value)
    if seconds is None:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(MAX_WAIT_SECONDS, max(0.0, seconds))


def backoff_seconds(attempt: int, *, base: float = 0.5, cap: float = 60.0) -> float:
    """Return a random wait in (0, min(cap, base * 2**attempt)]: full jitter, ``attempt`` from 0.

    Full jitter spreads a crowd of retries over the whole interval (Brooker, "Exponential Backoff
    And Jitter", 2015).
    """
    return random.uniform(0.05, 1.0) * min(cap, base * 2.0**attempt)


class RateGate:
    """One gate for all workers: passes a call when the server's limits leave room for it.

    Reads ``x-ratelimit-{remaining,reset}-{requests,tokens}`` from every response and the wait that
    a 429 or 503 asks for. The count in a header is older than the calls sent since, so those still on
    their way are taken off it.
    """

    def __init__(self) -> None:
        self._not_before = 0.0
        self._left: dict[str, tuple[float, float]] = {}  # kind -> (what is left, when it is refilled)
        self._in_flight = {"requests": 0.0, "tokens": 0.0}
        self._turn = asyncio.Lock()
        self.waited_seconds = 0.0

    async def enter(self, n_tokens: int) -> None:
        """Wait until a call of ``n_tokens`` (estimated) may be sent."""
        async with self._turn:
            while (delay := self._delay(n_tokens)) > 0:
                self.waited_seconds += delay
                await asyncio.sleep(delay)
            for kind, amount in (("requests", 1.0), ("tokens", float(n_tokens))):
                self._in_flight[kind] += amount
                if kind in self._left:
                    left, reset = self._left[kind]
                    self._left[kind] = (left - amount, reset)

    def leave(self, n_tokens: int, headers: Mapping[str, str] | None) -> None:
        """Note that the call came back, and what its response says about the limits."""
        self._in_flight["requests"] -= 1
        self._in_flight["tokens"] -= n_tokens
        for kind in ("requests", "tokens"):
            remaining = (headers or {}).get(f"x-ratelimit-remaining-{kind}")
            reset = duration_seconds((headers or {}).get(f"x-ratelimit-reset-{kind}"))
            if remaining is None or reset is None:
                continue
            try:
                left = float(remaining) - self._in_flight[kind]
            except ValueError:
                continue
            self._left[kind] = (left, time.monotonic() + min(reset, MAX_WAIT_SECONDS))

    def hold(self, seconds: float) -> None:
        """Send nothing for ``seconds``: the server asked for it."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _delay(self, n_tokens: int) -> float:
        now = time.monotonic()
        delay = self._not_before - now
        for kind, amount in (("requests", 1.0), ("tokens", float(n_tokens))):
            if kind not in self._left:
                continue
            left, reset = self._left[kind]
            if reset <= now:
                del self._left[kind]  # refilled; by how much the next response tells
            elif left < amount:
                delay = max(delay, reset - now)
        return delay
