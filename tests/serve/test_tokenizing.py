"""Tokenising beside the event loop: turns by characters, bounded texts, and what is refused without tokens."""

from __future__ import annotations

import asyncio
import threading

from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_edge.serve.tokenizing import FairTokenizer


def run(work):
    return asyncio.run(asyncio.wait_for(work, 30))


class Recorder:
    """Tokenises into lengths, one call at a time, and keeps the order of the texts it was given."""

    def __init__(self):
        self.seen = []
        self.go = threading.Event()

    def __call__(self, texts, task):
        self.go.wait(10)
        self.seen += [text[0] for text in texts]
        return [[len(text)] for text in texts]


def test_short_requests_pass_the_rest_of_long_ones():
    async def work():
        fair, work = FairTokenizer(), Recorder()
        long = [asyncio.create_task(fair.tokenize(work, [name * 4096] * 8, "label", 16384)) for name in "AB"]
        await asyncio.sleep(0)
        short = asyncio.create_task(fair.tokenize(work, ["s" * 60] * 20, "label", 16384))
        await asyncio.sleep(0)
        work.go.set()
        assert await short == [[60]] * 20
        assert not any(task.done() for task in long)
        assert [await task for task in long] == [[[4096]] * 8] * 2
        fair.close()
        order = "".join(work.seen)
        assert order.index("s") <= 2
        assert order.replace("s", "") == "AB" * 8  # and long ones take turns

    run(work())


def test_what_is_given_up_is_not_tokenised():
    async def work():
        fair, work = FairTokenizer(), Recorder()
        first = asyncio.create_task(fair.tokenize(work, ["a" * 4096] * 50, "label", 16384))
        await asyncio.sleep(0)
        first.cancel()
        work.go.set()
        assert await fair.tokenize(work, ["b"], "label", 16384) == [[1]]
        fair.close()
        assert work.seen == ["a", "b"]  # only what ran when it was given up

    run(work())


def test_an_error_is_its_own_requests():
    async def work():
        fair = FairTokenizer()

        def fail(texts, task):
            raise ValueError("no")

        good = Recorder()
        good.go.set()
        asked = (fair.tokenize(fail, ["a"], "label", 9), fair.tokenize(good, ["b", "cc"], "label", 9))
        failed, answered = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(failed, ValueError)
        assert answered == [[1], [2]]
        fair.close()

    run(work())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9000), min_size=1, max_size=6), min_size=1, max_size=6))
def test_every_request_gets_its_own_rows_in_order(lengths):
    async def work():
        fair, work = FairTokenizer(), Recorder()
        work.go.set()
        asked = [fair.tokenize(work, ["x" + "y" * n for n in row], "label", 5000) for row in lengths]
        assert await asyncio.gather(*asked) == [[[n + 1] for n in row] for row in lengths]
        assert fair.wait_estimate_s(10) == 10 * fair.seconds_per_character  # nothing is left behind
        fair.close()

    run(work())


def test_a_text_over_the_limit_by_its_characters_is_never_tokenised(hand_bundle, running):
    async def work():
        async with running(hand_bundle) as app:
            seen = []
            real = app.engine.tokenize
            app.engine.tokenize = lambda texts, task="label": seen.extend(texts) or real(texts, task)
            answer = await app.predict(["fine", "a" * 1_000_000])
            assert (answer.status_code, seen) == (400, [])
            assert "texts[1] has 1000000 characters; this model reads at most 16384" in answer.json()["error"]
            assert app.service.gate.inside == app.service.body_bytes.inside == 0
            assert app.service.registry.find("hand").label_gate.inside == 0

    run(work())


def test_tokenising_that_waits_counts_in_the_estimate(hand_bundle, running):
    async def work():
        async with running(hand_bundle, max_queue_ms=100) as app:
            fair = app.service._tokenizing
            fair.seconds_per_character = 1e-4
            held = Recorder()
            waiting = asyncio.create_task(fair.tokenize(held, ["w" * 8000], "label", 16384))
            await asyncio.sleep(0)
            app.service.registry.find("hand").label_gate.enter(1)  # an empty gate lets everyone in
            long = await app.predict(["word " * 30 + "x" * 2000])
            assert (long.status_code, app.rejected("queue_time")) == (429, 1)
            assert (await app.predict(["short"])).status_code == 200  # not on that path
            held.go.set()
            await waiting
            app.service.registry.find("hand").label_gate.leave(1)

    run(work())
