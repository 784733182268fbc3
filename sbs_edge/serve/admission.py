"""Admission limits: check a request against a limit and count it, before any work is spent on it.

The event loop runs one callback at a time and nothing here awaits, so no other request can come between a
check and its count. A burst beyond the limits is answered 429 without tokenising.

A request is admitted on its head, before the number of texts in its body is known. Until they are counted,
it counts as many texts as recent requests had on average. Otherwise every request of a burst would claim the
same free places, and most would be rejected only after they were parsed.
"""

from __future__ import annotations

from collections.abc import Callable

from sbs_edge.serve import errors

__all__ = ["AdmissionSlot", "Budget", "Gate", "PendingEstimate"]


class Gate:
    """Counts admitted units; rejects those over the limit.

    Args:
        limit: most units (requests, texts or bytes) admitted at once.
        reason: label of ``sbs_edge_rejected_total`` for rejections.
        max_wait_s: longest estimated wait in seconds; ``None`` for no bound.
    """

    def __init__(self, limit: int, reason: str, max_wait_s: float | None = None) -> None:
        self.limit = limit
        self.inside = 0
        self._reason = reason
        self._max_wait_s = max_wait_s

    def refusal(
        self, units: int = 1, seconds_per_unit: float = 0.0, ahead: int = 0, before_s: float = 0.0
    ) -> errors.HttpError | None:
        """Return the 429 for ``units`` that do not fit, or ``None`` if they do.

        ``seconds_per_unit`` is the measured service time, ``ahead`` the admitted units that are not
        counted yet, ``before_s`` an estimated wait before this queue. An empty gate always admits a request,
        whatever the estimate says, so that one slow measurement cannot shut the server.
        """
        taken = self.inside + ahead
        wait_s = taken * seconds_per_unit + before_s
        if taken + units > self.limit:
            return errors.overloaded(self._reason, wait_s)
        if self._max_wait_s is not None and taken and wait_s > self._max_wait_s:
            return errors.overloaded("queue_time", wait_s)
        return None

    def enter(self, units: int = 1, seconds_per_unit: float = 0.0, before_s: float = 0.0) -> None:
        """Check and count ``units`` in one step; raise the 429 if they do not fit."""
        refusal = self.refusal(units, seconds_per_unit, before_s=before_s)
        if refusal is not None:
            raise refusal
        self.inside += units

    def leave(self, units: int = 1) -> None:
        """Take ``units`` off the count."""
        self.inside -= units


class Budget(Gate):
    """Counts the bytes of admitted bodies; calls ``on_low`` when most of them have left.

    The C library keeps freed memory for later use; ``on_low`` can return it to the system.
    """

    _MIN_RELEASED = 1 << 20  # bytes; less is not worth a call

    def __init__(self, limit: int, on_low: Callable[[], None]) -> None:
        super().__init__(limit, "body_bytes")
        self._on_low = on_low
        self._peak = 0

    def enter(self, units: int = 1, seconds_per_unit: float = 0.0, before_s: float = 0.0) -> None:
        """Add ``units`` bytes to the count, or raise the 429."""
        super().enter(units)
        self._peak = max(self._peak, self.inside)

    def leave(self, units: int = 1) -> None:
        """Take ``units`` bytes off the count."""
        super().leave(units)
        if self._peak > 4 * self.inside + self._MIN_RELEASED:
            self._peak = self.inside
            self._on_low()


class PendingEstimate:
    """Estimates the texts of admitted requests whose bodies are not parsed yet, from recent requests."""

    def __init__(self) -> None:
        self.texts = 0
        self._mean = 1.0

    def expect(self) -> int:
        """Add a request; return the number of texts it counts as."""
        n_texts = max(1, round(self._mean))
        self.texts += n_texts
        return n_texts

    def learn(self, n_texts: int) -> None:
        """Update the mean with a request's real number of texts."""
        self._mean += 0.1 * (n_texts - self._mean)


class AdmissionSlot:
    """The place of an admitted request, and an estimate of its texts until they are counted.

    ``withdraw_estimate`` and ``leave`` may be called again without effect.
    """

    __slots__ = ("_budget", "_bytes", "_estimate", "_gate", "_pending")

    def __init__(self, gate: Gate, pending: PendingEstimate, budget: Gate) -> None:
        """Take a place; the caller has checked that one is free."""
        gate.inside += 1
        self._budget = budget
        self._bytes = 0
        self._gate: Gate | None = gate
        self._pending = pending
        self._estimate = pending.expect()

    def hold(self, n_bytes: int) -> None:
        """Count more bytes of the body; raise 429 if all bodies together exceed the budget."""
        self._budget.enter(n_bytes)
        self._bytes += n_bytes

    def count_texts(self, n_texts: int) -> None:
        """Replace the estimate: the body has been parsed and holds ``n_texts``."""
        self.withdraw_estimate()
        self._pending.learn(n_texts)

    def withdraw_estimate(self) -> None:
        """Drop the estimate: a body that is still arriving must not keep other requests out."""
        self._pending.texts -= self._estimate
        self._estimate = 0

    def leave(self) -> None:
        """Free the place."""
        self.withdraw_estimate()
        if self._bytes:
            self._budget.leave(self._bytes)
            self._bytes = 0
        if self._gate is not None:
            self._gate.leave(1)
            self._gate = None
