"""Progress of a study: how many runs are done and what is left, a bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sbs_edge.progress import EVERY_S, duration

__all__ = ["StudyProgress"]


class StudyProgress:
    """Shows the runs done of all runs, and the time left by the work in them.

    Args:
        efforts: about how much work each run is, in any unit.
        at_once: runs that are carried out at the same time.
        finished: indices of runs that an earlier start of the study finished.
        stream: where it goes; None: stderr.
        clock: seconds; replaced in tests.

    """

    def __init__(
        self,
        efforts: Sequence[float],
        at_once: int,
        finished: Sequence[int] = (),
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._efforts, self._at_once, self._clock = efforts, at_once, clock
        self._before = set(finished)
        self._done: set[int] = set()
        self._stream = stream or sys.stderr
        self._began = self._last = self._finished_at = clock()
        self._text = ""
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("study"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[text]}"), console=Console(file=self._stream), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._bar.add_task("study", total=len(efforts), completed=len(self._before), left="", text="")

    def seconds_left(self) -> float | None:
        """Return an estimate, or None before the first run has finished.

        The rate is that up to the last run that finished; the runs beside it count as half done then. What has been
        done since follows from the rate, up to nearly all of the runs under way.
        """
        if not self._done:
            return None
        left = [e for n, e in enumerate(self._efforts) if n not in self._done and n not in self._before]
        beside = sum(left[: self._at_once - 1]) / 2
        rate = (sum(self._efforts[n] for n in self._done) + beside) / max(
            self._finished_at - self._began, 1e-9
        )
        since = rate * (self._clock() - self._finished_at)
        under_way = sum(left[: self._at_once]) - beside
        return (sum(left) - beside - min(since, 0.95 * under_way)) / rate

    def finish(self, index: int, text: str) -> None:
        """Note that a run is done; ``text`` says what came of it."""
        self._done.add(index)
        self._finished_at = self._clock()
        self._show(text, due=True)

    def tick(self) -> None:
        """Show the time left again, if that is due."""
        self._show("", due=self._bar is not None or self._clock() - self._last >= 6 * EVERY_S)

    def _show(self, text: str, *, due: bool) -> None:
        if not due:
            return
        self._last = self._clock()
        seconds = self.seconds_left()
        count = len(self._done) + len(self._before)
        left = "" if seconds is None or count == len(self._efforts) else f"{duration(seconds)} left"
        if self._bar is not None:
            self._text = text or self._text
            self._bar.update(self._bar.task_ids[0], completed=count, left=left, text=self._text)
            return
        parts = [f"study: {count} of {len(self._efforts)} runs", left, text]
        self._stream.write(", ".join(part for part in parts if part) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
