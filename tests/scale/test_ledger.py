"""The account that all actors share: never overdrawn, nothing stranded, exact after an actor's death."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_edge.errors import UsageError
from sbs_edge.scale.ledger import Ledger, SharedBudget
from sbs_edge.teacher.cost import Prices

PRICES = Prices(1.0, 2.0)


class Handle:
    """The ledger as a worker sees it: ``handle.method.remote(...)`` is awaited."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> object:
        method = getattr(self._ledger, name)
        return type("Method", (), {"remote": staticmethod(method)})


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 50), st.integers(1, 50), st.floats(0, 1)),
        min_size=1,
        max_size=40,
    ),
    limit=st.integers(0, 1500),
    before=st.integers(0, 200),
)
def test_no_order_of_calls_passes_the_limit_and_none_is_refused_without_need(
    calls: list[tuple[int, int, int, float]], limit: int, before: int
) -> None:
    async def run() -> None:
        ledger = Ledger(Prices(), None, limit, {9: (0.0, before)})
        used_in_all = before

        async def one(unit: int, prompt: int, most: int, share: float) -> None:
            nonlocal used_in_all
            budget = SharedBudget(Prices(), Handle(ledger), unit)
            if not await budget.reserve(prompt, most):
                assert before + sum(call[1] + call[2] for call in calls) > limit  # no need, no refusal
                return
            await asyncio.sleep(0)
            used = prompt, int(most * share)
            await budget.settle((prompt, most), used)
            used_in_all += sum(used)
            assert used_in_all <= max(limit, before)

        await asyncio.gather(*(one(*call) for call in calls))
        assert (await ledger.spent())[1] == used_in_all

    asyncio.run(run())


def test_what_a_dead_actor_held_is_free_again_when_its_unit_starts_again() -> None:
    async def run() -> None:
        ledger = Ledger(PRICES, None, 300, {})
        await ledger.begin(0, 0.0, 0)
        assert await ledger.reserve(0, 50, 50)
        assert await ledger.reserve(0, 50, 50)
        waiting = asyncio.create_task(ledger.reserve(1, 100, 100))
        await asyncio.sleep(0)
        assert not waiting.done()  # the dead actor's calls might still settle
        await ledger.begin(0, 0.00012, 90)  # one of the two had been answered and journalled
        assert await waiting
        assert (await ledger.spent())[1] == 90
        assert await ledger.settle(0, (50, 50), (50, 40)) == 0.0  # a ghost's settling changes nothing
        await ledger.settle(1, (100, 100), (100, 100))
        assert await ledger.spent() == (pytest.approx(0.00012 + 0.0003), 290)
        assert not await ledger.reserve(2, 10, 10)

    asyncio.run(run())


def test_a_limit_on_money_needs_prices() -> None:
    with pytest.raises(UsageError, match="price_in"):
        Ledger(Prices(), 1.0, None, {})
