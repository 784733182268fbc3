"""Who gets in: a check and a count in one step, before any work is spent on a request.

The event loop runs one callback at a time and nothing here awaits, so a check and its count cannot
be torn apart by another request. A burst beyond the limits is answered 429 without tokenising.
"""

from __future__ import annotations

from sbs_edge.serve import errors

__all__ = ["Gate"]


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

    def refusal(self, units: int = 1, seconds_per_unit: float = 0.0) -> errors.HttpError | None:
        """Return the 429 ``units`` would be answered with, or ``None`` where they fit.

        ``seconds_per_unit`` is the measured service time; an empty gate always lets a request in,
        whatever the estimate says, so that one slow measurement cannot shut the server.
        """
        wait_s = self.inside * seconds_per_unit
        if self.inside + units > self.limit:
            return errors.overloaded(self._reason, wait_s)
        if self._max_wait_s is not None and self.inside and wait_s > self._max_wait_s:
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
