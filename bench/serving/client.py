"""A light load generator: prepared bytes over kept connections, loopback only.

The client shares a small machine with the server, so it does as little as possible: a protocol object for
each connection, no task for a request, and no parsing beyond status and length. Its own processor time is
measured as well (``Record.cpu_s``).
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

__all__ = [
    "HOST", "BlockingClient", "Client", "Job", "Outcome", "Record", "closed_loop", "milliseconds", "open_loop",
    "percentile", "request_bytes", "run",
]  # fmt: skip

HOST = "127.0.0.1"
_TICK_S = 0.002
_GET_LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

Job = tuple[bytes, int]  # raw request, texts in it
Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work`` on uvloop where it is installed: its sockets cost half of asyncio's."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def percentile(values: Sequence[float], q: float) -> float:
    """Return the ``q``-th percentile (0..100) by nearest rank; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q / 100))]


def milliseconds(seconds: float) -> float:
    """Return the time in ms, to a microsecond."""
    return round(seconds * 1e3, 3)


@dataclass(slots=True)
class Outcome:
    """One answered request: its status (0: connection lost) and times in seconds."""

    status: int
    due_s: float
    latency_s: float
    n_texts: int = 0
    late_s: float = 0.0  # open loop: sent so long after it was due, by the client's own fault


@dataclass(slots=True)
class Record:
    """All outcomes of one phase."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    unsent: int = 0  # open loop: requests for which the client had no connection left
    cpu_s: float = 0.0  # processor time of this process
    oversleep: list[float] = field(default_factory=list)  # open loop: how late the client's own loop woke, s

    @property
    def codes(self) -> dict[str, int]:
        """Count of each status."""
        return {str(code): n for code, n in sorted(Counter(o.status for o in self.outcomes).items())}

    def latencies(self, status: int) -> list[float]:
        """Return the latencies in seconds of answers with ``status``."""
        return [o.latency_s for o in self.outcomes if o.status == status]

    @property
    def lateness(self) -> list[float]:
        """Delay of each request after it was due, in seconds."""
        return [o.late_s for o in self.outcomes]

    def answer_times(self, status: int) -> list[float]:
        """Seconds from sending to the answer, of answers with ``status``."""
        return [o.latency_s - o.late_s for o in self.outcomes if o.status == status]

    def goodput(self, from_s: float = 0.0) -> float:
        """Texts a second of requests answered 200 from ``from_s`` to the phase's end."""
        ends = ((o.due_s + o.latency_s, o.n_texts) for o in self.outcomes if o.status == 200)
        inside = sum(n_texts for end_s, n_texts in ends if from_s <= end_s <= self.seconds)
        return inside / max(self.seconds - from_s, 1e-9)


def request_bytes(path: str, body: bytes, headers: str = "") -> bytes:
    """Return a whole HTTP/1.1 POST."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _whole_answer(buffer: bytes) -> tuple[int, bytes, bool] | None:
    """Status, body, and whether the connection closes after it; None while some of it is missing."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = buffer[:end].lower()
    at = head.find(b"content-length:")
    line_end = head.find(b"\r\n", at)
    length = int(head[at + 15 : line_end if line_end >= 0 else None]) if at >= 0 else 0
    if len(buffer) < end + 4 + length:
        return None
    return int(head[9:12]), buffer[end + 4 :], head.find(b"connection: close") >= 0


Done = Callable[[int, bytes], None]


class _Connection(asyncio.Protocol):
    """One kept connection with at most one request on it."""

    __slots__ = ("_buffer", "_client", "_done", "transport")

    def __init__(self, client: Client) -> None:
        self._client = client
        self._buffer = b""
        self._done: Done | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # TCP gives a Transport

    def request(self, raw: bytes, done: Done) -> None:
        self._done = done
        self.transport.write(raw)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer = self._buffer + data if self._buffer else data
        found = _whole_answer(buffer)
        if found is None:
            return
        self._buffer = b""
        done, self._done = self._done, None
        status, body, closes = found
        if closes:
            self.transport.close()
        else:
            self._client.take_back(self)
        if done:
            done(status, body)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost(self)
        done, self._done = self._done, None
        if done:
            done(0, b"")


class BlockingClient:
    """A kept connection with blocking calls, so that no event loop of the client adds to its times.

    Args:
        port: the server's.
        timeout_s: longest silence within an answer.
    """

    def __init__(self, port: int, timeout_s: float = 40.0) -> None:
        self._socket = socket.create_connection((HOST, port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def ask(self, raw: bytes) -> tuple[int, bytes]:
        """Send one request, wait for its whole answer; return (status, body).

        Raises:
            ConnectionError: the server closed the connection before the answer was whole.
        """
        self._socket.sendall(raw)
        held = b""
        while (found := _whole_answer(held)) is None:
            piece = self._socket.recv(1 << 16)
            if not piece:
                raise ConnectionError("The server closed the connection within an answer.")
            held += piece
        status, body, _ = found
        return status, body


class Client:
    """A pool of kept connections to one port; ``most`` bounds how many are open."""

    def __init__(self, port: int, most: int = 512) -> None:
        self._port = port
        self._most = most
        self._idle: deque[_Connection] = deque()  # the one that rested longest first: none grows old
        self._connections: set[_Connection] = set()
        self._n_open = 0
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: list[asyncio.Future[None]] = []

    async def open(self, n: int) -> None:
        """Have ``n`` connections ready; each is used once, because servers close those that never are."""
        made = []
        while self._n_open < min(n, self._most):
            self._n_open += 1
            made.append(await self._connect())
        answered = [asyncio.get_running_loop().create_future() for _ in made]
        for connection, future in zip(made, answered, strict=True):
            connection.request(_GET_LIVE, lambda *_, future=future: future.set_result(None))
        await asyncio.gather(*answered)

    async def _connect(self) -> _Connection:
        """Open a connection that the caller has counted already: room taken late is taken twice."""
        try:
            _, made = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), HOST, self._port
            )
        except OSError:
            self._one_less()
            raise
        self._connections.add(made)
        return made

    def take_back(self, connection: _Connection) -> None:
        """A connection is free again."""
        self._idle.append(connection)
        self._wake()

    def lost(self, connection: _Connection) -> None:
        """A connection was closed; it is replaced when one is needed."""
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._one_less()

    def _one_less(self) -> None:
        self._n_open -= 1
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            waiter = self._waiting.pop(0)
            if not waiter.done():  # given up by its task
                return waiter.set_result(None)

    @property
    def has_room(self) -> bool:
        """Return whether a request can be sent now."""
        return bool(self._idle) or self._n_open < self._most

    def start(self, raw: bytes, done: Done) -> bool:
        """Send on a free connection, else on a new one, and call ``done(status, body)`` later.

        False where no connection is free and no more may be opened.
        """
        if self._idle:
            self._idle.popleft().request(raw, done)
            return True
        if self._n_open >= self._most:
            return False
        self._n_open += 1

        async def connect() -> None:
            try:
                (await self._connect()).request(raw, done)
            except OSError:
                done(0, b"")

        task = asyncio.get_running_loop().create_task(connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        return True

    async def send(self, raw: bytes) -> tuple[int, bytes]:
        """Send one request; return (status, body), status 0 when the connection was lost."""
        while not self._idle and self._n_open >= self._most:
            self._waiting.append(asyncio.get_running_loop().create_future())
            await self._waiting[-1]
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

        def done(status: int, body: bytes) -> None:
            if not answer.done():
                answer.set_result((status, body))

        self.start(raw, done)
        return await answer

    async def close(self) -> None:
        """Close every idle connection, and wait until it is."""
        for connection in list(self._idle):
            connection.transport.close()
        while self._idle:
            await asyncio.sleep(0)


async def closed_loop(
    client: Client,
    jobs: Sequence[Job],
    *,
    concurrency: int,
    seconds: float = float("inf"),
    count: int | None = None,
) -> Record:
    """Send requests from ``concurrency`` callers that each wait for their answer."""
    record, sent = Record(), 0
    started, cpu = time.perf_counter(), time.process_time()

    async def caller() -> None:
        nonlocal sent
        while time.perf_counter() - started < seconds and (count is None or sent < count):
            raw, n_texts = jobs[sent % len(jobs)]
            sent += 1
            now = time.perf_counter()
            status, _ = await client.send(raw)
            record.outcomes.append(Outcome(status, now - started, time.perf_counter() - now, n_texts))

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    record.seconds, record.cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return record


async def open_loop(
    client: Client,
    jobs: Sequence[Job],
    *,
    rate: float,
    seconds: float,
    count: int | None = None,
    each: Callable[[int], None] | None = None,
    patient: bool = False,
) -> Record:
    """Send ``rate`` requests a second whether or not earlier ones were answered.

    Latency counts from the time a request was due; ``Record.answer_times`` from its sending. What lies
    between is the client's own lateness (``Record.lateness``). A request for which no connection is
    free is counted as unsent instead of being sent late, or where ``patient`` waits for one. ``each`` is
    called with the number of answers so far.
    """
    record = Record()
    outcomes, outstanding = record.outcomes, 0
    started, cpu = time.perf_counter(), time.process_time()

    def begin(job: Job, due_s: float) -> None:
        nonlocal outstanding
        raw, n_texts = job
        sent_s = time.perf_counter() - started

        def done(status: int, _: bytes) -> None:
            nonlocal outstanding
            outstanding -= 1
            latency_s = time.perf_counter() - started - due_s
            outcomes.append(Outcome(status, due_s, latency_s, n_texts, sent_s - due_s))
            if each:
                each(len(outcomes))

        if client.start(raw, done):
            outstanding += 1
        else:
            record.unsent += 1

    index = 0
    while (now := time.perf_counter() - started) < seconds and (count is None or index < count):
        while (due_s := index / rate) <= now and due_s < seconds and (count is None or index < count):
            if patient and not client.has_room:
                break
            begin(jobs[index % len(jobs)], due_s)
            index += 1
        rest = max(0.0, min(_TICK_S, index / rate - (time.perf_counter() - started)))
        if patient and not client.has_room:
            rest = _TICK_S
        asleep = time.perf_counter()
        await asyncio.sleep(rest)
        record.oversleep.append(time.perf_counter() - asleep - rest)
    record.seconds, record.cpu_s = time.perf_counter() - started, time.process_time() - cpu
    end = time.perf_counter() + 40
    while outstanding and time.perf_counter() < end:
        await asyncio.sleep(_TICK_S)
    return record
