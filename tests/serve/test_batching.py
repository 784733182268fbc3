"""The queue: token budget, order, similar lengths, waiting and cancellation. Times are tens of milliseconds."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_edge.serve.batching import Batcher


class Worker:
    """Work that waits until ``go`` is set, so that a queue can build up behind it."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int]]] = []
        self.go = threading.Event()

    def __call__(self, batch):
        self.batches.append(list(batch))
        self.go.wait(5)
        return [(name, length * 2) for name, length in batch]


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(1, 80), min_size=1, max_size=6), min_size=1, max_size=12),
    budget=st.integers(1, 200),
    workers=st.integers(1, 3),
)
@pytest.mark.anyio
async def test_every_text_is_answered_once_in_order_and_within_the_budget(requests, budget, workers):
    worker = Worker()
    batcher = Batcher(worker, max_batch_tokens=budget, max_wait_s=0, workers=workers)
    submitted = []
    for i, lengths in enumerate(requests):
        submitted.append(batcher.submit([(f"{i}.{j}", n) for j, n in enumerate(lengths)], lengths))
    worker.go.set()
    for i, (request, lengths) in enumerate(zip(submitted, requests, strict=True)):
        got = await asyncio.wait_for(request.future, 5)
        assert got == [(f"{i}.{j}", 2 * n) for j, n in enumerate(lengths)]
    assert batcher.queued == 0
    batcher.close()
    sent = [name for batch in worker.batches for name, _ in batch]
    assert sorted(sent) == sorted(f"{i}.{j}" for i, row in enumerate(requests) for j in range(len(row)))
    for batch in worker.batches:
        assert len(batch) == 1 or len(batch) * max(n for _, n in batch) <= budget


@pytest.mark.anyio
async def test_like_lengths_go_together_and_the_oldest_goes_first():
    worker = Worker()
    batcher = Batcher(worker, max_batch_tokens=40, max_wait_s=0)
    first = batcher.submit([("first", 5)], [5])
    await asyncio.sleep(0.02)
    rest = [batcher.submit([(f"t{n}", n)], [n]) for n in (10, 40, 9, 39, 11, 10)]
    worker.go.set()
    await asyncio.gather(first.future, *(t.future for t in rest))
    batcher.close()
    names = [[name for name, _ in batch] for batch in worker.batches]
    assert names[0] == ["first"]
    assert sorted(names[1]) == ["t10", "t10", "t9"]  # nearest to the oldest, 4 * 11 would not fit
    assert sorted(map(tuple, names[2:])) == [("t11",), ("t39",), ("t40",)]


@pytest.mark.anyio
async def test_a_short_text_overtakes_long_ones_that_came_before_it():
    worker = Worker()
    batcher = Batcher(worker, max_batch_tokens=40, max_wait_s=0)
    running = batcher.submit([("running", 40)], [40])
    await asyncio.sleep(0.02)
    rest = [batcher.submit([(name, n)], [n]) for name, n in (("long 1", 40), ("long 2", 40), ("short", 4))]
    worker.go.set()
    await asyncio.gather(running.future, *(t.future for t in rest))
    batcher.close()
    assert [name for batch in worker.batches for name, _ in batch] == ["running", "short", "long 1", "long 2"]


@pytest.mark.anyio
async def test_a_long_text_is_overtaken_until_eight_times_its_tokens_are_served():
    worker = Worker()
    worker.go.set()
    batcher = Batcher(worker, max_batch_tokens=40, max_wait_s=0)
    long = batcher.submit([("long", 40)], [40])

    def next_short() -> None:  # another short text is always waiting
        if not long.future.done():
            batcher.submit([("short", 4)], [4]).future.add_done_callback(lambda _: next_short())

    for _ in range(11):  # a full batch, and one that waits behind it
        next_short()
    await asyncio.wait_for(long.future, 20)
    batcher.close()
    overtook = [name for batch in worker.batches for name, _ in batch].index("long")
    # A short text that comes once 8 * (40 - 4) tokens have been served is too late; those that wait then go first.
    assert 8 * (40 - 4) / 4 <= overtook <= 8 * (40 - 4) / 4 + 11


@pytest.mark.anyio
async def test_a_lone_text_does_not_wait_but_company_on_its_way_is_waited_for():
    worker = Worker()
    worker.go.set()
    batcher = Batcher(worker, max_wait_s=0.2)
    started = time.perf_counter()
    await batcher.submit([("alone", 3)], [3]).future
    assert time.perf_counter() - started < 0.1
    batcher.expected = 1
    early = batcher.submit([("early", 3)], [3])
    await asyncio.sleep(0.02)
    batcher.expected = 0
    late = batcher.submit([("late", 3)], [3])
    await asyncio.gather(early.future, late.future)
    assert [name for name, _ in worker.batches[1]] == ["early", "late"]
    batcher.expected = 1  # somebody is announced and never comes: the wait is bounded
    started = time.perf_counter()
    await batcher.submit([("bounded", 3)], [3]).future
    assert 0.15 < time.perf_counter() - started < 1
    batcher.close()


@pytest.mark.anyio
async def test_groups_never_mix_and_abandoned_work_never_runs():
    worker = Worker()
    batcher = Batcher(worker, max_wait_s=0)
    hold = batcher.submit([("hold", 1)], [1])
    await asyncio.sleep(0.02)
    a = batcher.submit([("a1", 4), ("a2", 4)], [4, 4], "a")
    b = batcher.submit([("b1", 4)], [4], "b")
    gone = batcher.submit([("gone", 4)], [4], "a")
    assert batcher.queued == 4
    batcher.abandon(gone)
    batcher.abandon(gone)
    assert batcher.queued == 3
    worker.go.set()
    await asyncio.gather(hold.future, a.future, b.future)
    batcher.close()
    assert [[name for name, _ in batch] for batch in worker.batches] == [["hold"], ["a1", "a2"], ["b1"]]


@pytest.mark.anyio
async def test_a_failing_batch_fails_its_requests_and_the_lane_goes_on():
    def work(batch):
        if "bad" in batch:
            raise ValueError("bad batch")
        return batch

    batcher = Batcher(work, max_wait_s=0)
    bad = batcher.submit(["bad"], [1])
    with pytest.raises(ValueError, match="bad batch"):
        await bad.future
    assert await batcher.submit(["good"], [1]).future == ["good"]
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(["after"], [1])


@pytest.mark.anyio
async def test_closing_fails_what_still_waits():
    worker = Worker()
    batcher = Batcher(worker, max_wait_s=0)
    running = batcher.submit([("running", 1)], [1])
    await asyncio.sleep(0.02)
    waiting = batcher.submit([("waiting", 1)], [1])
    batcher.close()
    with pytest.raises(RuntimeError, match="before this work began"):
        await waiting.future
    worker.go.set()
    assert await running.future == [("running", 2)]


def test_a_worker_begins_the_next_whole_batch_without_the_event_loop():
    """The loop's thread is blocked from the hand-over on; only what stands ready can run then."""

    async def go(ahead):
        begun = [threading.Event(), threading.Event()]
        go_on = threading.Event()
        batches = []

        def work(batch):
            batches.append(list(batch))
            begun[min(len(batches), 2) - 1].set()
            go_on.wait(10)
            return batch

        batcher = Batcher(work, max_batch_tokens=8, max_wait_s=0, ahead=ahead)
        submitted = [batcher.submit([f"{i}a", f"{i}b"], [4, 4]) for i in range(4)]
        while not begun[0].is_set():
            await asyncio.sleep(0)
        go_on.set()
        without_loop = begun[1].wait(1 if ahead == 0 else 10)  # blocks this thread, and so the loop
        for request in submitted:
            assert await asyncio.wait_for(request.future, 10) == list(request.payloads)
        batcher.close()
        assert sorted(map(len, batches)) == [2, 2, 2, 2]
        return without_loop

    assert asyncio.run(go(1)) is True
    assert asyncio.run(go(0)) is False


@pytest.mark.anyio
async def test_what_stands_ready_is_whole_and_still_drops_what_is_given_up():
    worker = Worker()
    batcher = Batcher(worker, max_batch_tokens=8, max_wait_s=0, ahead=1)
    hold = batcher.submit([("hold", 8)], [8])
    while not worker.batches:
        await asyncio.sleep(0)
    gone = batcher.submit([("gone", 4)], [4])
    await asyncio.sleep(0.01)
    assert batcher.queued == 1  # half a batch does not stand ready: others may still join it
    kept = batcher.submit([("kept", 4)], [4])
    late = batcher.submit([("late", 4)], [4])
    while batcher.queued != 1:
        await asyncio.sleep(0)
    batcher.abandon(gone)  # from the batch that stands ready
    worker.go.set()
    await asyncio.gather(hold.future, kept.future, late.future)
    batcher.close()
    assert [[name for name, _ in batch] for batch in worker.batches] == [["hold"], ["kept"], ["late"]]
    assert 0 < kept.enqueued_s <= kept.started_s <= kept.finished_s


@pytest.mark.anyio
async def test_a_lone_quick_text_runs_at_once_and_every_other_on_a_worker():
    loops, threads = threading.get_ident(), []

    def work(batch):
        threads.append(threading.get_ident())
        if "slow" in batch:
            time.sleep(0.1)
        if "bad" in batch:
            raise ValueError("no")
        return [f"{text}!" for text in batch]

    batcher = Batcher(work, max_wait_s=0)

    async def run(*texts, length=8):
        threads.clear()
        submitted = [batcher.submit([text], [length]) for text in texts]
        found = [(await asyncio.wait_for(request.future, 5))[0] for request in submitted]
        assert found == [f"{text}!" for text in texts]
        return {thread == loops for thread in threads}

    assert await run("first") == {False}, "nobody knows yet how long it takes"
    while await run("warm") == {False}:  # the threads' own start may have made the first ones slow
        await asyncio.sleep(0.01)
    assert await run("lone") == {True}
    assert await run("a", "b") == {False}
    assert await run("long", length=400) == {False}
    batcher.expected = 1
    assert await run("company comes") == {False}
    batcher.expected = 0
    with pytest.raises(ValueError, match="no"):
        await run("bad")
    assert await run("after an error") == {True}
    await run("slow")
    assert await run("after a slow one") == {False}
    batcher.close()

    several = Batcher(work, max_wait_s=0, workers=2)
    threads.clear()
    for text in ("one", "two", "three"):
        assert await asyncio.wait_for(several.submit([text], [8]).future, 5) == [f"{text}!"]
    assert loops not in threads
    several.close()


def test_the_estimate_learns_from_full_batches_and_one_slow_start_does_not_shut_the_queue():
    """A queue is worked off in full batches; what a lone text takes after a start says nothing about it."""
    batcher = Batcher(lambda batch: batch, max_batch_tokens=512)
    try:
        batcher._learn(0.020, 1, 8 / 512)  # the first text of a cold process: 20 ms
        assert batcher.wait_estimate_s(1024) < 0.5
        for _ in range(20):
            batcher._learn(0.0006, 1, 8 / 512)
        assert batcher.wait_estimate_s(1024) < 0.05
        batcher._learn(0.060, 32, 1.0)  # the first full batch is slow too
        for _ in range(9):
            batcher._learn(0.006, 32, 1.0)
        assert batcher.wait_estimate_s(1) == pytest.approx((0.060 + 9 * 0.006) / 320)
        before = batcher.wait_estimate_s(1)
        for _ in range(50):
            batcher._learn(0.0006, 1, 8 / 512)  # lone texts between bursts leave it alone
        assert batcher.wait_estimate_s(1) == before
    finally:
        batcher.close()
