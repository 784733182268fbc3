"""Tokens and money: the cost of a call, before and after it, and the budget.

Prices are given by the user and never looked up, because they change. Their unit is money per million tokens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from sbs_edge.errors import UsageError

__all__ = ["Budget", "Estimate", "Prices", "TokenEstimator"]


@dataclass(frozen=True, slots=True)
class Prices:
    """Money per million prompt tokens and per million answer tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return the price of one call."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    @property
    def known(self) -> bool:
        """Return whether any price was given."""
        return self.prompt > 0 or self.completion > 0


class TokenEstimator:
    """Estimates tokens from characters: 3.5 characters per token until the server has counted some.

    Common English tokenizers reach about 4, so the first estimate has rather too many tokens. Every counted prompt
    updates the ratio. An estimate adds 2 %, and eight tokens for the chat template.
    """

    def __init__(self, chars_per_token: float = 3.5) -> None:
        self._chars = 0
        self._tokens = 0
        self._initial = chars_per_token

    def learn(self, n_chars: int, n_tokens: int) -> None:
        """Update the ratio with a prompt that the server has counted."""
        if n_chars > 0 and n_tokens > 0:
            self._chars += n_chars
            self._tokens += n_tokens

    @property
    def chars_per_token(self) -> float:
        """Return the current ratio."""
        return self._chars / self._tokens if self._tokens else self._initial

    def tokens(self, n_chars: int) -> int:
        """Return the estimated number of tokens of ``n_chars`` characters."""
        return int(n_chars / self.chars_per_token * 1.02) + 8


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a run: likely, and at most (every answer as long as allowed)."""

    calls: int
    prompt_tokens: int
    likely_completion_tokens: int
    most_completion_tokens: int
    likely_cost: float
    most_cost: float


class Budget:
    """Admits a call only if even its longest answer stays within the limits.

    Every call in flight reserves its longest answer, and is charged what it took, so that concurrent calls cannot
    exceed the limit. The cost of earlier runs with the same journal counts.

    Args:
        prices: money per million tokens.
        max_cost: limit of the total cost, or None.
        max_tokens: limit of all tokens (prompt and answer), or None.
        spent_cost, spent_tokens: cost and tokens of the journal's calls.

    """

    def __init__(
        self,
        prices: Prices,
        max_cost: float | None = None,
        max_tokens: int | None = None,
        spent_cost: float = 0.0,
        spent_tokens: int = 0,
    ) -> None:
        if max_cost is not None and not prices.known:
            raise UsageError(
                "A limit on cost needs prices: give price_in and price_out (money per million tokens), "
                "or limit tokens with max_total_tokens."
            )
        self.prices = prices
        self.max_cost = max_cost
        self.max_tokens = max_tokens
        self.spent_cost = spent_cost
        self.spent_tokens = spent_tokens
        self.exhausted = False
        self._reserved_cost = 0.0
        self._reserved_tokens = 0
        self._changed = asyncio.Condition()

    def _fits(self, cost: float, tokens: int) -> bool:
        if self.max_cost is not None and self.spent_cost + self._reserved_cost + cost > self.max_cost + 1e-12:
            return False
        return (
            self.max_tokens is None or self.spent_tokens + self._reserved_tokens + tokens <= self.max_tokens
        )

    async def reserve(self, prompt_tokens: int, completion_tokens: int) -> bool:
        """Reserve the most that a call may take; return False if the limits do not allow it, now or later."""
        cost = self.prices.cost(prompt_tokens, completion_tokens)
        tokens = prompt_tokens + completion_tokens
        async with self._changed:
            while not self._fits(cost, tokens):
                if self._reserved_tokens == 0 or self.exhausted:
                    self.exhausted = True
                    self._changed.notify_all()
                    return False
                await self._changed.wait()  # a call in flight may take less than it reserved
            self._reserved_cost += cost
            self._reserved_tokens += tokens
        return True

    async def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> float:
        """Replace a reservation (prompt, answer tokens) by the actual usage; return its cost."""
        cost = self.prices.cost(*used)
        async with self._changed:
            self._reserved_cost -= self.prices.cost(*reserved)
            self._reserved_tokens -= sum(reserved)
            self.spent_cost += cost
            self.spent_tokens += sum(used)
            self._changed.notify_all()
        return cost
