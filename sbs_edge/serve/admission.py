"""Who gets in: a check and a count in one step, before any work is spent on a request.

The event loop runs one callback at a time and nothing here awaits, so a check and its count cannot
be torn apart by another request. A burst beyond the limits is answered 429 without tokenising.

A request is judged from its head, before anybody knows how many texts its body holds. Until they are
counted it stands for as many as requests brought lately; otherwise every request of a burst would be let
in on the strength of the same free places, and most be refused after they were parsed.
"""

from __future__ import annotations

from collections.abc import Callable

from sbs_edge.serve import errors

__all__ = ["AdmissionSlot", "Budget", "Gate", "PendingEstimate"]


class Gate:
    """Counts what is inside; refuses what does not fit.

    Args:
        limit: most units (requests or texts) inside at once.
        reason: label for the metrics when it refuses.
        max_wait_s: most seconds of estimated queue; ``None`` for no such bound.
    """

    def __init__(self, limit: int, reason: str, max_wait_s: float | None = None) -> None:
        self.limit = limit
        self.inside = 0
        self._reason = reason
        self._max_wait_s = max_wait_s

    def refusal(
        self, units: int = 1, seconds_per_unit: float = 0.0, ahead: int = 0, before_s: float = 0.0
    ) -> errors.HttpError | None:
        """Return the 429 ``units`` would be answered with, or ``None`` where they fit.

        ``seconds_per_unit`` is the measured service time, ``ahead`` the units let in that are not
        counted yet, ``before_s`` an estimated wait before this queue. An empty gate always lets a request
        in, whatever the estimate says, so that one slow measurement cannot shut the server.
        """
        taken = self.inside + ahead
        wait_s = taken * seconds_per_unit + before_s
        if taken + units > self.limit:
            return errors.overloaded(self._reason, wait_s)
        if self._max_wait_s is not None and taken and wait_s > self._max_wait_s:
            return errors.overloaded("queue_time", wait_s)
        return None

    def enter(self, units: int = 1, seconds_per_unit: float = 0.0, before_s: float = 0.0) -> None:
        """Check and count ``units`` in, in one step; raise the 429 where they do not fit."""
        refusal = self.refusal(units, seconds_per_unit, before_s=before_s)
        if refusal is not None:
            raise refusal
        self.inside += units

    def leave(self, units: int = 1) -> None:
        """Count ``units`` out again."""
        self.inside -= units


class Budget(Gate):
    """Bytes of the bodies inside. When most of what stood inside has left, ``on_low`` is called.

    The C library keeps freed memory for later; ``on_low`` is the time to give it back to the system.
    """

    _WORTH = 1 << 20  # bytes

    def __init__(self, limit: int, on_low: Callable[[], None]) -> None:
        super().__init__(limit, "body_bytes")
        self._on_low = on_low
        self._peak = 0

    def enter(self, units: int = 1, seconds_per_unit: float = 0.0, before_s: float = 0.0) -> None:
        """Count ``units`` bytes in, or raise the 429."""
        super().enter(units)
        self._peak = max(self._peak, self.inside)

    def leave(self, units: int = 1) -> None:
        """Count ``units`` bytes out again."""
        super().leave(units)
        if self._peak > 4 * self.inside + self._WORTH:
            self._peak = self.inside
            self._on_low()


class PendingEstimate:
    """Texts of requests that were let in and not read yet: an estimate, by what requests held lately."""

    def __init__(self) -> None:
        self.texts = 0
        self._mean = 1.0

    def expect(self) -> int:
        """Add one more request; return how many texts it stands for."""
        share = max(1, round(self._mean))
        self.texts += share
        return share

    def learn(self, n_texts: int) -> None:
        """Take a request's real number of texts into the mean."""
        self._mean += 0.1 * (n_texts - self._mean)


class AdmissionSlot:
    """One admitted request: its place, and until they are counted the texts it may bring.

    Every method may be called again without effect.
    """

    __slots__ = ("_budget", "_bytes", "_coming", "_gate", "_share")

    def __init__(self, gate: Gate, coming: PendingEstimate, budget: Gate) -> None:
        """Take the place; the caller has checked that there is one."""
        gate.inside += 1
        self._budget = budget
        self._bytes = 0
        self._gate: Gate | None = gate
        self._coming = coming
        self._share = coming.expect()

    def hold(self, n_bytes: int) -> None:
        """Count more bytes of its body in; raise 429 where all bodies together are over the budget."""
        self._budget.enter(n_bytes)
        self._bytes += n_bytes

    def counted(self, n_texts: int) -> None:
        """Its texts stand in a queue now (or were refused there)."""
        self.unexpect()
        self._coming.learn(n_texts)

    def unexpect(self) -> None:
        """Stop standing for texts: a body that is still on its way must not keep others out."""
        self._coming.texts -= self._share
        self._share = 0

    def leave(self) -> None:
        """Give the place back."""
        self.unexpect()
        if self._bytes:
            self._budget.leave(self._bytes)
            self._bytes = 0
        if self._gate is not None:
            self._gate.leave(1)
            self._gate = None
