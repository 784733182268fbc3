"""Rejected requests: each is counted in the metrics, and their totals are logged once a second.

A server under four times its load rejects three requests for each that it answers. A log line and a look-up of
metric labels for each would cost more than the rejection itself, and would hide the lines that matter.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from sbs_edge.serve.logs import logger
from sbs_edge.serve.metrics import Metrics

__all__ = ["Refusals"]

_EVERY_S = 1.0


class Refusals:
    """Counts rejections by reason, and logs their totals at most once a second.

    Args:
        metrics: holds ``sbs_edge_rejected_total``; the child of each reason is looked up once.
        log: whether to log the totals.
    """

    def __init__(self, metrics: Metrics, *, log: bool) -> None:
        self._metrics = metrics
        self._log = log
        self._children: dict[str, Any] = {}
        self._unwritten: Counter[tuple[str, int]] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def count(self, reason: str) -> None:
        """Count a request rejected for ``reason`` in the metrics."""
        child = self._children.get(reason)
        if child is None:
            child = self._children[reason] = self._metrics.rejected.labels(reason)
        child.inc()

    def note(self, reason: str, status: int) -> None:
        """Add a rejection to the next line of the log."""
        if not self._log:
            return
        self._unwritten[reason, status] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_EVERY_S, self.flush)

    def flush(self) -> None:
        """Log the totals since the last line."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for (reason, status), n_requests in self._unwritten.items():
            logger.warning("refused", reason=reason, code=status, n_requests=n_requests)
        self._unwritten.clear()
