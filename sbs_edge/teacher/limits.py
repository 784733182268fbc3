"""Read a server's limits from its headers, and decide how long to wait before the next attempt.

The module knows nothing of the openai package; it reads header mappings and numbers.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

__all__ = ["RateGate", "backoff_seconds", "duration_seconds", "retry_after_seconds"]

_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(us|µs|ms|s|m|h|d)")
_EPOCH = 1e8  # seconds; a number beyond it is a moment (since 1970), not a duration
MAX_WAIT_SECONDS = 3600.0
# Kind of limit -> (what is left, when it is refilled), as servers name the headers.
_HEADERS = (
    ("requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("requests", "x-ratelimit-remaining", "x-ratelimit-reset"),
    ("requests", "ratelimit-remaining", "ratelimit-reset"),
)


def duration_seconds(text: str | None) -> float | None:
    """Return the seconds from now that a header asks for, or None if it cannot be read.

    Readable forms are ``1.5`` (seconds), ``120ms``, ``6m0s``, a Unix time in seconds or milliseconds, an ISO 8601
    time and an HTTP date.

    Example:
        >>> duration_seconds("1m2s")
        62.0

    """
    plain = (text or "").strip()
    try:
        value = float(plain)
    except ValueError:
        return _span(plain.casefold()) if plain else None
    if not math.isfinite(value):
        return None
    while value > 1000 * _EPOCH:  # milliseconds, microseconds or finer
        value /= 1000
    return max(0.0, value - time.time() if value > _EPOCH else value)


def _span(plain: str) -> float | None:
    parts = list(_PART.finditer(plain))
    if parts and not _PART.sub("", plain).strip():
        return sum(float(part[1]) * _UNITS[part[2]] for part in parts)
    try:
        moment = datetime.fromisoformat(plain)
    except ValueError:
        try:
            moment = email.utils.parsedate_to_datetime(plain)
        except (TypeError, ValueError, IndexError):
            return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the wait of ``retry-after-ms`` or ``Retry-After`` in seconds, at most an hour."""
    milliseconds = (headers.get("retry-after-ms") or "").strip()
    seconds = duration_seconds(f"{milliseconds}ms") if milliseconds else None
    if seconds is None:
        seconds = duration_seconds(headers.get("retry-after"))
    return None if seconds is None else min(MAX_WAIT_SECONDS, seconds)


def backoff_seconds(attempt: int, *, base: float = 0.5, cap: float = 60.0) -> float:
    """Return a random wait in (0, min(cap, base * 2**attempt)]: full jitter, ``attempt`` from 0.

    Full jitter spreads a crowd of retries over the whole interval (Brooker, "Exponential Backoff
    And Jitter", 2015).
    """
    return random.uniform(0.05, 1.0) * min(cap, base * 2.0**attempt)


class RateGate:
    """A gate for all workers, which lets a call pass when the server's limits allow it.

    It reads the rate-limit headers of every response and the wait that a 429 or 503 asks for. The count in a
    header is older than the calls sent since, so calls in flight are subtracted from it.

    Args:
        on_wait: called with the seconds and the reason before a wait of a second or more.

    """

    def __init__(self, on_wait: Callable[[float, str], None] | None = None) -> None:
        self._not_before = 0.0
        self._held_for = ""
        self._left: dict[str, tuple[float, float, str]] = {}  # kind -> (what is left, when refilled, said by)
        self._in_flight = {"requests": 0.0, "tokens": 0.0}
        self._turn = asyncio.Lock()
        self._on_wait = on_wait
        self.waited_seconds = 0.0

    async def enter(self, n_tokens: int) -> None:
        """Wait until a call of ``n_tokens`` (estimated) may be sent."""
        async with self._turn:
            while (wait := self._delay(n_tokens))[0] > 0:
                self.say(*wait)
                self.waited_seconds += wait[0]
                await asyncio.sleep(wait[0])
            for kind, amount in (("requests", 1.0), ("tokens", float(n_tokens))):
                self._in_flight[kind] += amount
                if kind in self._left:
                    left, reset, said_by = self._left[kind]
                    self._left[kind] = (left - amount, reset, said_by)

    def leave(self, n_tokens: int, headers: Mapping[str, str] | None) -> None:
        """Note that the call has returned, and read the limits from its response."""
        self._in_flight["requests"] -= 1
        self._in_flight["tokens"] -= n_tokens
        seen: set[str] = set()
        for kind, remaining_name, reset_name in _HEADERS:
            try:
                remaining = float((headers or {}).get(remaining_name, ""))
            except ValueError:
                continue
            reset = duration_seconds((headers or {}).get(reset_name))
            if kind in seen or reset is None or not remaining >= 0:  # below 0: the server counts nothing
                continue
            seen.add(kind)
            until = time.monotonic() + min(reset, MAX_WAIT_SECONDS)
            self._left[kind] = (remaining - self._in_flight[kind], until, f"{remaining_name}: {remaining:g}")

    def hold(self, seconds: float, reason: str) -> None:
        """Send nothing for ``seconds``, because the server asked for it."""
        until = time.monotonic() + seconds
        if until > self._not_before:
            self._not_before, self._held_for = until, reason

    def say(self, seconds: float, reason: str) -> None:
        """Announce a wait that a person would notice."""
        if self._on_wait is not None and seconds >= 1.0:
            self._on_wait(seconds, reason)

    def _delay(self, n_tokens: int) -> tuple[float, str]:
        now = time.monotonic()
        wait = self._not_before - now, self._held_for
        for kind, amount in (("requests", 1.0), ("tokens", float(n_tokens))):
            if kind not in self._left:
                continue
            left, reset, said_by = self._left[kind]
            if reset <= now:
                del self._left[kind]  # refilled; the next response tells by how much
            elif left < amount:
                wait = max(wait, (reset - now, f"the server's limit on {kind} is used up ({said_by})"))
        return wait
