"""A server's words about its limits, and the waits that follow from them."""

from __future__ import annotations

import time

import pytest

from sbs_edge.teacher.limits import RateGate, duration_seconds, retry_after_seconds


def test_every_spelling_of_a_moment_is_read():
    from email.utils import formatdate

    now = time.time()
    assert [duration_seconds(text) for text in ("1m2s", "120ms", "1.5", "2 s", "1H", "0")] == [
        62,
        0.12,
        1.5,
        2,
        3600,
        0,
    ]
    for moment in (str(int(now) + 30), str(int((now + 30) * 1000)), formatdate(now + 30, usegmt=True)):
        assert duration_seconds(moment) == pytest.approx(30, abs=3)
    assert [duration_seconds(text) for text in ("nan", "inf", "soon", "", None)] == [None] * 5
    assert duration_seconds(str(int(now) - 30)) == 0
    assert retry_after_seconds({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after_seconds({"retry-after": "1e9"}) <= 3600


def test_a_gate_says_that_it_waits_and_ignores_a_count_below_zero():
    import asyncio

    said: list[tuple[float, str]] = []

    async def go():
        gate = RateGate(lambda seconds, reason: said.append((seconds, reason)))
        await gate.enter(10)
        gate.leave(10, {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "60s"})
        await gate.enter(10)
        gate.leave(10, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(time.time() + 1.3)})
        await gate.enter(10)

    asyncio.run(go())
    assert len(said) == 1
    assert said[0][0] == pytest.approx(1.3, abs=0.3)
    assert "x-ratelimit-remaining: 0" in said[0][1]
