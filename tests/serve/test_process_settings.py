"""Process settings keep the event loop quick: workers have a lower priority, and the collector skips loaded models."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from sbs_edge.serve import process_settings as interpreter
from sbs_edge.serve.batching import Batcher


@pytest.fixture
def collector():
    """Put the collector of the test run back as it was."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


class Node:
    """Something that can be part of a cycle and be watched."""


def test_what_is_loaded_is_out_of_the_collectors_way_and_freed_once_retired(collector):
    kept = Node()
    kept.itself = kept  # type: ignore[attr-defined]
    seen = weakref.ref(kept)
    interpreter.freeze_gc()
    assert gc.get_freeze_count() > 1000
    assert not any(each is kept for each in gc.get_objects())
    del kept
    gc.collect()
    assert seen() is not None  # frozen: no collection looks at it
    interpreter.freeze_gc()
    assert seen() is None


@pytest.mark.anyio
async def test_a_reload_tidies_and_a_look_without_news_does_not(hand_bundle, running, hand):
    calls = []
    app = running(hand_bundle)
    app.service.registry.on_change = lambda: calls.append(1)
    async with app:
        assert len(calls) == 1
        await app.service.registry.refresh()
        assert len(calls) == 1
        hand.write(hand_bundle, "2")
        app.engine.version = "2"
        await app.service.registry.refresh()
        assert len(calls) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
@pytest.mark.parametrize("steps", [0, 5])
def test_workers_stand_back_only_where_asked_and_the_loop_does_not(steps):
    def priority(batch=None):
        return [os.getpriority(os.PRIO_PROCESS, 0)]

    mine = priority()
    batcher = Batcher(priority, nice=steps)
    try:
        assert batcher._pool.submit(priority).result() == [min(mine[0] + steps, 19)]
    finally:
        batcher.close()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(priority).result() == mine  # only the batcher's own threads
