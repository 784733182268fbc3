"""The journal: every answer that was paid for, on disk before it counts.

It is append-only JSON Lines with one finished call per line, keyed by a hash of prompt, model, parameters and
sample number. A line is written and flushed to the disk (fsync) before the call is reported as
finished, so that a killed run repeats only the calls in flight. A later line for the
same key replaces an earlier one. An incomplete last line, left by a kill, is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from sbs_edge.chat.protocol import content_text, token_count
from sbs_edge.data.rows import is_text, printable
from sbs_edge.errors import DataError, UsageError
from sbs_edge.files import fsync_directory

__all__ = ["Journal", "Record"]


@dataclass(frozen=True, slots=True)
class Record:
    r"""One finished call. Half a character in its texts, which no file in UTF-8 can hold, is spelt out: ``\ud800``.

    Attributes:
        key: see :func:`sbs_edge.teacher.prompt.call_key`.
        text: the teacher's text; empty if it wrote nothing.
        finish_reason: the protocol's value (``stop``, ``length``, ``content_filter``).
        error: why there is no text (``refused``, ``http-400: ...``), or None.
        prompt_tokens, completion_tokens: as counted by the server, else estimated.
        cost: money for this call, in the unit of the prices that were given; 0 without prices.
        seconds: wall time of the successful attempt.
        attempts: number of times that the call was sent, retries included.
        model: the model that answered.
        sample: number of the sample, from 0.
        at: when it was finished, seconds since 1970.
        server: the server's address, without secrets; a refusal counts only for that server.
        reasoning: the model's reasoning, if the server sent it apart from ``text``.
        top_logprobs: the answer's last tokens with the log-probabilities at their places, where asked for.

    """

    key: str
    text: str
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    attempts: int = 1
    model: str = ""
    sample: int = 0
    at: float = 0.0
    server: str = ""
    reasoning: str = ""
    top_logprobs: tuple[tuple[str, dict[str, float]], ...] = ()

    def __post_init__(self) -> None:
        for name in ("text", "finish_reason", "error", "model", "reasoning"):
            value = getattr(self, name)
            if isinstance(value, str) and not is_text(value):
                object.__setattr__(self, name, printable(value))

    @property
    def is_refusal(self) -> bool:
        """Return whether the server refused the request itself, which another address or parameter may change."""
        return self.error is not None and self.error.split(":", 1)[0] in ("rejected", "generation")


_FIELDS = {field.name for field in fields(Record)}
_RECORD = TypeAdapter(Record)
_NOTE = "#"  # begins the key of a note; the keys of calls are hexadecimal


class Journal:
    """An open journal, which one process at a time may use (advisory lock).

    Use as a context manager. ``records`` maps each key to its latest record; ``notes`` holds what a run decided and
    the next one must keep to; ``skipped`` counts complete lines whose fields are not of a record's types, as older
    versions wrote them: their calls are asked again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.notes: dict[str, str] = {}
        self.total_cost = 0.0
        self.total_tokens = 0
        self.skipped = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(
                    f"The journal {path} is in use by another run. Wait for it, or use another one (journal=FILE)."
                ) from error
            if is_new:
                fsync_directory(path.parent)
            self._recover()
        except BaseException:
            os.close(self._fd)
            raise
        self._waiting: list[tuple[Record, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def close(self) -> None:
        """Release the lock and the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _recover(self) -> None:
        good = 0
        for number, start, line in _lines(self.path):
            complete = line.endswith(b"\n")
            try:
                record = _decode(line)
            except ValueError as error:
                if complete:
                    raise DataError(
                        f"{self.path}, line {number}: not a journal line ({error}). Everything else is intact; "
                        "delete this line, and its call will be repeated."
                    ) from error
                break
            if not complete:
                break  # the newline is part of the write: without it the line was never reported as done
            good = start + len(line)
            if record is None:
                self.skipped += 1
            else:
                self._take(record)
        if good < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, good)
            os.fsync(self._fd)

    def _take(self, record: Record) -> None:
        if record.key.startswith(_NOTE):
            self.notes[record.key.removeprefix(_NOTE)] = record.text
            return
        self.records[record.key] = record
        self.total_cost += record.cost
        self.total_tokens += record.prompt_tokens + record.completion_tokens

    def note(self, name: str, text: str) -> None:
        """Write a note that later runs read in ``notes``; a later note of the same name replaces it."""
        self.append(Record(_NOTE + name, text))

    def append(self, *records: Record) -> None:
        """Write records and flush them to the disk; return when they are safe."""
        content = b"".join(_encode(record) for record in records)
        view = memoryview(content)
        while view:
            view = view[os.write(self._fd, view) :]
        os.fsync(self._fd)
        for record in records:
            self._take(record)

    async def append_soon(self, record: Record) -> None:
        """Append like :meth:`append`, but off the event loop; calls that finish together share a flush."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((record, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._drain())
        await done

    async def _drain(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self.append, *(record for record, _ in batch))
            except BaseException as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(error)
                if not isinstance(error, OSError):
                    raise
                continue
            for _, done in batch:
                with contextlib.suppress(asyncio.InvalidStateError):
                    done.set_result(None)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    start = 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            yield number, start, line
            start += len(line)


def _encode(record: Record) -> bytes:
    content = asdict(record)
    if not record.top_logprobs:
        del content["top_logprobs"]
    content["at"] = content["at"] or round(time.time(), 3)
    if not record.reasoning:
        del content["reasoning"]
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"


def _decode(line: bytes) -> Record | None:
    """Return the record of a line, None where its fields are of other types; ValueError: not a journal line."""
    try:
        content: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or not isinstance(content.get("key"), str):
        raise ValueError("no key")
    if "text" not in content:
        raise ValueError("no text")
    fields = {name: value for name, value in content.items() if name in _FIELDS}
    try:
        fields["text"] = content_text(fields["text"])  # older versions kept a list of parts as it came
        for name in ("prompt_tokens", "completion_tokens"):
            fields[name] = token_count(fields.get(name, 0)) or 0
        return _RECORD.validate_python(fields)
    except (ValidationError, ValueError):
        return None
