"""Who gets in: a check and a count in one step, before any work is spent on a request.

The event loop runs one callback at a time and nothing here awaits, so a check and its count cannot
be torn apart by another request. A burst beyond the limits is answered 429 without tokenising.

A request is judged from its head, before anybody knows how many texts its body holds. Until they are
counted it stands for as many as requests brought lately; otherwise every request of a burst would be let
in on the strength of the same free places, and most be refused after they were parsed.
"""

from __future__ import annotations

from sbs_edge.serve import errors

__all__ = ["Coming", "Gate", "Passage"]


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
        self, units: int = 1, seconds_per_unit: float = 0.0, ahead: int = 0
    ) -> errors.HttpError | None:
        """Return the 429 ``units`` would be answered with, or ``None`` where they fit.

        ``seconds_per_unit`` is the measured service time, ``ahead`` the units let in that are not
        counted yet. An empty gate always lets a request in, whatever the estimate says, so that one
        slow measurement cannot shut the server.
        """
        taken = self.inside + ahead
        wait_s = taken * seconds_per_unit
        if taken + units > self.limit:
            return errors.overloaded(self._reason, wait_s)
        if self._max_wait_s is not None and taken and wait_s > self._max_wait_s:
            return errors.overloaded("queue_time", wait_s)
        return None

    def enter(self, units: int = 1, seconds_per_unit: float = 0.0) -> None:
        """Check and count ``units`` in, in one step; raise the 429 where they do not fit."""
        refusal = self.refusal(units, seconds_per_unit)
        if refusal is not None:
            raise refusal
        self.inside += units

    def leave(self, units: int = 1) -> None:
        """Count ``units`` out again."""
        self.inside -= units


class Coming:
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


class Passage:
    """One admitted request: its place, and until they are counted the texts it may bring.

    Every method may be called again without effect.
    """

    __slots__ = ("_coming", "_gate", "_share")

    def __init__(self, gate: Gate, coming: Coming) -> None:
        """Take the place; the caller has checked that there is one."""
        gate.inside += 1
        self._gate: Gate | None = gate
        self._coming = coming
        self._share = coming.expect()

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
        if self._gate is not None:
            self._gate.leave(1)
            self._gate = None
