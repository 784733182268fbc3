"""Keep the texts of doubtful and escalated answers in a file that ``sbs-edge annotate`` reads.

The event loop only puts a row into a queue of bounded size; a thread of its own writes, and what does not fit is dropped
and counted. The file is private to its owner. When it is full it is renamed, and the oldest of four parts is removed, so
that all parts together stay below a number of bytes. Several processes may write to one file.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import queue
import random
import secrets
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from sbs_edge.errors import UsageError
from sbs_edge.serve.inference_request import InferenceRequest
from sbs_edge.serve.logs import logger
from sbs_edge.serve.metrics import Metrics

fcntl: Any
try:
    fcntl = import_module("fcntl")
except ImportError:  # Windows has none; there one process may write to a file
    fcntl = None

__all__ = ["Recorder"]

PARTS = 4
MAX_WAITING_CHARACTERS = 4 << 20
_ROW_CHARACTERS = 500  # of a row besides its text, about
_GATHER_S = 0.2  # a wake-up of the thread may delay the event loop, so it writes at most five times a second
_COMPLAIN_EVERY_S = 60.0
_CLOSE_S = 5.0


class Recorder:
    """Writes rows of doubtful and escalated answers.

    Args:
        path: the file; its name ends in ``.jsonl``. Full parts are named ``NAME.1.jsonl`` (the newest) and so on.
        below: answers with a lower probability are kept, and those marked as abstained or escalated.
        share: of these, in (0, 1]; the others are left out at random.
        max_bytes: of all parts together.
        metrics: counts rows that were kept, dropped (the queue was full, or the row too long) or failed.

    Raises:
        UsageError: the file cannot be written.
    """

    def __init__(self, path: Path, below: float, share: float, max_bytes: int, metrics: Metrics) -> None:
        self._path, self._below, self._share = path, below, share
        self._part_bytes = max_bytes // PARTS
        self._counter = metrics.recorded
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # Each is changed by one thread alone, so neither needs a lock.
        self._offered = self._taken = 0
        self._complained_s = -_COMPLAIN_EVERY_S
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                os.close(self._open())
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written: {error.strerror or error}. Choose another file (record=FILE)."
            ) from error
        self._thread = threading.Thread(target=self._work, name="record", daemon=True)
        self._thread.start()
        logger.warning("recording_texts", path=str(path), below=below, share=share, max_bytes=max_bytes)

    def offer(
        self, model: str, version: str, request: InferenceRequest, answers: list[dict[str, Any]]
    ) -> None:
        """Keep the doubtful ones of a request's answers; takes microseconds and never waits."""
        for index, answer in enumerate(answers):
            escalated = answer["escalated"]
            own = answer["student"] if escalated else answer
            if not (escalated or answer["abstained"] or own["probability"] < self._below):
                continue
            if self._share < 1.0 and random.random() >= self._share:
                continue
            text = request.texts[index]
            size = len(text) + _ROW_CHARACTERS
            if self._offered - self._taken + size > MAX_WAITING_CHARACTERS:
                self._counter.labels(model, "dropped").inc()
                continue
            row: dict[str, Any] = {
                "input": text,
                "choices": list(request.labels[index]) if request.labels else None,
                "student_label": own["label"],
                "probability": own["probability"],
                "teacher_label": answer["label"] if escalated else None,
                "reason": "escalated" if escalated else "unsure",
                "model": model,
                "version": version,
                "time": time.time(),
            }
            self._offered += size
            self._queue.put(row)

    def close(self) -> None:
        """Write what waits, for at most five seconds, and stop; the log tells what was not written."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            waiting = self._offered - self._taken
            logger.error("record_cut_off", path=str(self._path), waiting_characters=waiting)

    def _work(self) -> None:
        running = True
        while running:
            rows = [self._queue.get()]
            if rows[0] is not None:
                time.sleep(_GATHER_S)
            with contextlib.suppress(queue.Empty):
                while True:
                    rows.append(self._queue.get_nowait())
            running = None not in rows
            self._write([row for row in rows if row is not None])

    def _write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; one that cannot be written is counted and lost."""
        for row in rows:
            self._taken += len(row["input"]) + _ROW_CHARACTERS
            try:
                with self._locked():
                    result = self._append(_line(row))
            except OSError as error:  # a full disk must not stop the server
                result = "failed"
                if time.monotonic() - self._complained_s >= _COMPLAIN_EVERY_S:
                    self._complained_s = time.monotonic()
                    logger.error("record_failed", path=str(self._path), error=error.strerror)
            self._counter.labels(row["model"], result).inc()

    def _append(self, line: bytes) -> str:
        if len(line) > self._part_bytes:
            return "dropped"
        fd = self._open(len(line))
        try:
            size = os.fstat(fd).st_size
            if os.write(fd, line) < len(line):
                os.ftruncate(fd, size)  # half a row would make the file unreadable
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(fd)
        return "kept"

    def _open(self, n_bytes: int = 0) -> int:
        """Open the file for appending ``n_bytes``; a full one is renamed first."""
        while True:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            fd = os.open(self._path, flags, 0o600)
            state = os.fstat(fd)
            if state.st_mode & 0o077:
                os.fchmod(fd, 0o600)
            if not state.st_size or state.st_size + n_bytes <= self._part_bytes:
                return fd
            os.close(fd)
            for number in range(PARTS - 1, 0, -1):
                source = self._part(number - 1)
                if source.exists():
                    os.replace(source, self._part(number))

    def _part(self, number: int) -> Path:
        return self._path.with_suffix(f".{number}{self._path.suffix}") if number else self._path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from renaming the file at the same time."""
        if fcntl is None:
            yield
            return
        fd = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _line(row: dict[str, Any]) -> bytes:
    at = datetime.datetime.fromtimestamp(row["time"], datetime.UTC).isoformat(timespec="seconds")
    document = {"id": secrets.token_hex(8), **row, "time": at}
    text = json.dumps(
        {key: value for key, value in document.items() if value is not None}, ensure_ascii=False
    )
    return (text + "\n").encode("utf-8", errors="replace")
