"""One budget for all actors of an annotation: an actor keeps the account, workers ask it before every call.

An actor may die with calls on its way. What it had reserved is taken back when its unit begins anew, and what
the unit spent is then read from its journal, where every answer that was paid for and came back stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sbs_edge.teacher.cost import Budget, Prices

__all__ = ["Ledger", "SharedBudget"]


@dataclass(slots=True)
class _Account:
    """What one unit has spent, and what its calls on their way hold."""

    cost: float = 0.0
    tokens: int = 0
    reserved: list[tuple[int, int]] = field(default_factory=list)


class Ledger:
    """The account of a whole run; methods are coroutines, so that a call that waits holds up no other.

    Args:
        prices: money per million tokens.
        max_cost: money in all, or None.
        max_tokens: tokens in all, or None.
        spent: unit -> (cost, tokens) of its journal, from earlier runs.

    Raises:
        UsageError: a limit on cost without prices.
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
        """Start ``unit``, or start it again: its journal says what it has spent, and nothing of it is on its way."""
        account = self._accounts.setdefault(unit, _Account())
        self._budget.spent_cost += cost - account.cost
        self._budget.spent_tokens += tokens - account.tokens
        lost, account.cost, account.tokens, account.reserved = account.reserved, cost, tokens, []
        for reserved in lost:
            await self._budget.settle(reserved, (0, 0))

    async def reserve(self, unit: int, prompt_tokens: int, completion_tokens: int) -> bool:
        """Reserve the most a call may take; False when the limits leave no room, now or later."""
        if not await self._budget.reserve(prompt_tokens, completion_tokens):
            return False
        self._accounts.setdefault(unit, _Account()).reserved.append((prompt_tokens, completion_tokens))
        return True

    async def settle(self, unit: int, reserved: tuple[int, int], used: tuple[int, int]) -> float:
        """Turn a reservation into what was used; return its cost."""
        account, held = self._accounts[unit], (reserved[0], reserved[1])
        if held not in account.reserved:
            return 0.0  # of an actor that was taken for dead; its unit has begun anew
        account.reserved.remove(held)
        cost = await self._budget.settle(held, used)
        account.cost += cost
        account.tokens += sum(used)
        return cost

    async def spent(self) -> tuple[float, int]:
        """Return (cost, tokens) of all units so far."""
        return self._budget.spent_cost, self._budget.spent_tokens


class SharedBudget(Budget):
    """A worker's side of the ledger: the budget that :func:`sbs_edge.teacher.ask.ask` asks.

    Args:
        prices: money per million tokens.
        ledger: handle of the actor.
        unit: whose calls these are.
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
