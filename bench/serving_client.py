"""A light load generator and the server it loads, both bounded; for ``bench/serving.py``.

The client speaks just enough HTTP/1.1 over asyncio streams (keep-alive, Content-Length) to cost a
tenth of a general client: on a small machine a heavy client would measure itself. Loopback only.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Client", "Outcome", "Record", "ServerUnderTest", "closed_loop", "open_loop", "percentile"]

HOST = "127.0.0.1"


def percentile(values: Sequence[float], q: float) -> float:
    """Return the ``q``-th percentile (0..100) by nearest rank; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))]


@dataclass(slots=True)
class Outcome:
    """One answered request: its status (0: connection lost) and times in seconds."""

    status: int
    due_s: float
    latency_s: float
    n_texts: int = 0


@dataclass(slots=True)
class Record:
    """All outcomes of one phase."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    unsent: int = 0  # open loop: requests the client itself could not send in time

    @property
    def codes(self) -> dict[str, int]:
        """Count of each status."""
        return {str(code): n for code, n in sorted(Counter(o.status for o in self.outcomes).items())}

    def latencies(self, status: int) -> list[float]:
        """Return the latencies in seconds of answers with ``status``."""
        return [o.latency_s for o in self.outcomes if o.status == status]

    @property
    def good_texts_per_s(self) -> float:
        """Answered texts per second."""
        return sum(o.n_texts for o in self.outcomes if o.status == 200) / max(self.seconds, 1e-9)


def request_bytes(path: str, body: bytes, headers: str = "") -> bytes:
    """Return a whole HTTP/1.1 POST."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Client:
    """A pool of keep-alive connections to one port."""

    def __init__(self, port: int, most: int = 1000) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._slots = asyncio.Semaphore(most)

    async def send(self, raw: bytes) -> tuple[int, bytes]:
        """Send one request; return (status, body), status 0 when the connection was lost."""
        async with self._slots:
            try:
                reader, writer = (
                    self._idle.pop() if self._idle else await asyncio.open_connection(HOST, self._port)
                )
                writer.write(raw)
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head[9:12])
                lower = head.lower()
                at = lower.find(b"content-length:")
                length = int(lower[at + 15 : lower.index(b"\r\n", at)]) if at >= 0 else 0
                body = await reader.readexactly(length) if length else b""
            except (OSError, asyncio.IncompleteReadError, ValueError):
                return 0, b""
            if b"connection: close" in lower:
                writer.close()
            else:
                self._idle.append((reader, writer))
            return status, body

    def close(self) -> None:
        """Close every idle connection."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


Job = tuple[bytes, int]  # raw request, texts in it


async def closed_loop(
    client: Client,
    jobs: Sequence[Job],
    *,
    concurrency: int,
    seconds: float = float("inf"),
    count: int | None = None,
    each: Callable[[int], None] | None = None,
) -> Record:
    """Send requests from ``concurrency`` callers that each wait for their answer."""
    record, sent = Record(), 0
    started = time.perf_counter()

    async def caller() -> None:
        nonlocal sent
        while time.perf_counter() - started < seconds and (count is None or sent < count):
            raw, n_texts = jobs[sent % len(jobs)]
            sent += 1
            now = time.perf_counter()
            status, _ = await client.send(raw)
            record.outcomes.append(Outcome(status, now - started, time.perf_counter() - now, n_texts))
            if each:
                each(len(record.outcomes))

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    record.seconds = time.perf_counter() - started
    return record


async def open_loop(client: Client, jobs: Sequence[Job], *, rate: float, seconds: float, most: int) -> Record:
    """Send ``rate`` requests a second whether or not earlier ones were answered.

    Latency counts from the time a request was due. ``most`` bounds what is outstanding; requests
    beyond it are counted as unsent instead of being sent late.
    """
    record, outstanding = Record(), set()  # type: Record, set[asyncio.Task[None]]
    started = time.perf_counter()

    async def one(job: Job, due_s: float) -> None:
        raw, n_texts = job
        status, _ = await client.send(raw)
        record.outcomes.append(Outcome(status, due_s, time.perf_counter() - started - due_s, n_texts))

    index = 0
    while (now := time.perf_counter() - started) < seconds:
        while (due_s := index / rate) <= now and due_s < seconds:
            if len(outstanding) < most:
                task = asyncio.create_task(one(jobs[index % len(jobs)], due_s))
                outstanding.add(task)
                task.add_done_callback(outstanding.discard)
            else:
                record.unsent += 1
            index += 1
        await asyncio.sleep(max(0.0, min(0.002, index / rate - (time.perf_counter() - started))))
    record.seconds = time.perf_counter() - started
    if outstanding:
        await asyncio.wait(outstanding, timeout=40)
    return record


class ServerUnderTest:
    """``sbs-edge serve`` in its own process; always stopped by ``with``."""

    def __init__(self, bundle: Path, *arguments: str) -> None:
        self._log = tempfile.NamedTemporaryFile("w", suffix=".log", delete=False)  # noqa: SIM115 (kept open)
        command = [
            sys.executable,
            "-P",
            "-m",
            "sbs_edge.cli",
            "serve",
            str(bundle),
            "--port",
            "0",
            *arguments,
        ]
        self.process = subprocess.Popen(command, stderr=self._log, stdout=subprocess.DEVNULL)
        self.port = 0

    def __enter__(self) -> ServerUnderTest:
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end and self.process.poll() is None:
                for line in Path(self._log.name).read_text().splitlines():
                    event = json.loads(line) if line.startswith("{") and line.endswith("}") else {}
                    if event.get("event") == "listening":
                        self.port = int(event["port"])
                    elif event.get("event") == "ready":
                        return self
                time.sleep(0.05)
            raise RuntimeError(f"The server did not get ready: {Path(self._log.name).read_text()[-2000:]}")
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()
        os.unlink(self._log.name)

    def _status(self, field_name: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field_name + ":"):
                return int(line.split()[1])
        return 0

    @property
    def rss_mib(self) -> float:
        """Resident memory in MiB."""
        return self._status("VmRSS") / 1024

    @property
    def n_threads(self) -> int:
        """Threads of the process."""
        return self._status("Threads")

    @property
    def n_descriptors(self) -> int:
        """Open descriptors that are not connections."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        count = 0
        for entry in folder.iterdir():
            try:
                count += not os.readlink(entry).startswith("socket:")
            except OSError:
                continue
        return count

    def metric(self, start: str) -> float:
        """Return the first metric whose line starts with ``start``; 0 if there is none."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(start):
                    return float(line.split()[-1])
        return 0.0
