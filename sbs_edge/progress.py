"""Report the progress of long work as plain lines on stderr, for logs and pipes; terminals get bars instead."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["EVERY_S", "ProgressLine", "duration", "heartbeat"]

EVERY_S = 5.0
"""Seconds between two lines."""


def duration(seconds: float) -> str:
    """Return a length of time as people write it.

    Example:
        >>> duration(75), duration(9000)
        ('1 min 15 s', '2 h 30 min')

    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class ProgressLine:
    """Writes ``what: 40 of 600 steps, 2 min 5 s left`` every :data:`EVERY_S` seconds.

    Work that ends before the first interval writes nothing.

    Args:
        what: name of the work.
        total: number of units, or None if unknown; lines then give the rate.
        unit: plural noun of the units.
        stream: where lines go; None: stderr.
        start: units done before this run, which do not count for its speed.
        clock: seconds; replaced in tests.

    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str = "rows",
        *,
        stream: TextIO | None = None,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._stream, self._start, self._clock = stream, start, clock
        self._began = self._last = clock()

    @property
    def due(self) -> bool:
        """Return whether the next :meth:`update` writes a line."""
        return self._clock() - self._last >= EVERY_S

    def update(self, done: int, text: str = "") -> None:
        """Note that ``done`` units are done; write a line, ended by ``text``, if one is due."""
        if not self.due:
            return
        self._last = self._clock()
        rate = (done - self._start) / max(self._last - self._began, 1e-9)
        if self.total is None:
            line = f"{self.what}: {done:,} {self.unit}, {rate:,.1f} per second"
        else:
            line = f"{self.what}: {done:,} of {self.total:,} {self.unit}"
            if rate > 0:
                line += f", {duration(max(self.total - done, 0) / rate)} left"
        stream = self._stream or sys.stderr
        stream.write(f"{line}{', ' if text else ''}{text}\n")
        stream.flush()


@contextmanager
def heartbeat(what: str, stage: Callable[[], str]) -> Iterator[None]:
    """Write ``what: STAGE, 35 s so far`` every :data:`EVERY_S` seconds, for work without a count.

    Args:
        what: name of the work.
        stage: returns the current stage, and how many there are.

    """
    done, began = threading.Event(), time.monotonic()

    def beat() -> None:
        while not done.wait(EVERY_S):
            sys.stderr.write(f"{what}: {stage()}, {duration(time.monotonic() - began)} so far\n")
            sys.stderr.flush()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
