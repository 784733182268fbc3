"""A budget for all actors of an annotation: one actor keeps the account, and workers ask it before every call.

An actor may die with calls in flight. Its reservations are released when its unit starts again, and the spending of
the unit is then read from its journal, which has every answer that was paid for and received.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sbs_edge.teacher.cost import Budget, Prices

__all__ = ["Ledger", "SharedBudget"]


@dataclass(slots=True)
class _Account:
    """The spending of a unit, and the reservations of its calls in flight."""

    cost: float = 0.0
    tokens: int = 0
    reserved: list[tuple[int, int]] = field(default_factory=list)


class Ledger:
    """The account of a whole run. Its methods are coroutines, so that a waiting call does not block others.

    Args:
        prices: money per million tokens.
        max_cost: limit of the total cost, or None.
        max_tokens: limit of all tokens, or None.
        spent: unit -> (cost, tokens) of its journal, from earlier runs.

    Raises:
        UsageError: there is a limit on cost but no prices.
    """

    def __init__(
        self,
        prices: Prices,
        max_cost: float | None,
        max_tokens: int | None,
        spent: Mapping[int, tuple[float, int]],
    ) -> None:
        self._accounts = {unit: _Account(cost, tokens) for unit, (cost, tokens) in spent.items()}
        self._budget = Budget(
            prices,
            max_cost,
            max_tokens,
            spent_cost=sum(account.cost for account in self._accounts.values()),
            spent_tokens=sum(account.tokens for account in self._accounts.values()),
        )

    async def begin(self, unit: int, cost: float, tokens: int) -> None:
        """Start ``unit``, possibly again: its spending is that of its journal, and it has no calls in flight."""
        account = self._accounts.setdefault(unit, _Account())
        self._budget.spent_cost += cost - account.cost
        self._budget.spent_tokens += tokens - account.tokens
        lost, account.cost, account.tokens, account.reserved = account.reserved, cost, tokens, []
        for reserved in lost:
            await self._budget.settle(reserved, (0, 0))

    async def reserve(self, unit: int, prompt_tokens: int, completion_tokens: int) -> bool:
        """Reserve the most that a call may take; return False if the limits do not allow it, now or later."""
        if not await self._budget.reserve(prompt_tokens, completion_tokens):
            return False
        self._accounts.setdefault(unit, _Account()).reserved.append((prompt_tokens, completion_tokens))
        return True

    async def settle(self, unit: int, reserved: tuple[int, int], used: tuple[int, int]) -> float:
        """Replace a reservation by the actual usage; return its cost."""
        account, held = self._accounts[unit], (reserved[0], reserved[1])
        if held not in account.reserved:
            return 0.0  # from an actor that was declared dead; its unit has started again
        account.reserved.remove(held)
        cost = await self._budget.settle(held, used)
        account.cost += cost
        account.tokens += sum(used)
        return cost

    async def spent(self) -> tuple[float, int]:
        """Return (cost, tokens) of all units so far."""
        return self._budget.spent_cost, self._budget.spent_tokens


class SharedBudget(Budget):
    """A worker's side of the ledger, which :func:`sbs_edge.teacher.ask.ask` uses as its budget.

    Args:
        prices: money per million tokens.
        ledger: handle of the actor.
        unit: the unit of these calls.
    """

    def __init__(self, prices: Prices, ledger: Any, unit: int) -> None:
        super().__init__(prices)
        self._ledger, self._unit = ledger, unit

    async def reserve(self, prompt_tokens: int, completion_tokens: int) -> bool:
        """See :meth:`Ledger.reserve`."""
        found: bool = await self._ledger.reserve.remote(self._unit, prompt_tokens, completion_tokens)
        return found

    async def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> float:
        """See :meth:`Ledger.settle`."""
        cost: float = await self._ledger.settle.remote(self._unit, reserved, used)
        return cost
