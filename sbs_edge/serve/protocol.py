"""HTTP/1.1 connections: uvicorn's httptools protocol, with a door and the limits it leaves to a proxy.

Work there is no room for is refused here, as soon as its head is parsed: no task, no routing, one write.
The connection stays open, and what comes of the body is skipped.

A request's line and headers must arrive within a time and within a size; otherwise a client that sends
one byte a minute, or headers without end, holds a connection or the memory of the process. Bodies are
bounded where they are read (:mod:`sbs_edge.serve.body`); the rest of a body whose request was already
answered has the time of a head.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sbs_edge.serve.admission import Passage
from sbs_edge.serve.door import Door, Refused, request_id

__all__ = ["Connection", "connections"]


class _Answered:
    """Stands where uvicorn keeps the request at hand: one that has been answered."""

    response_complete = True

    class message_event:
        """Nobody waits for the rest of it."""

        @staticmethod
        def set() -> None:
            """Wake nobody."""


_ANSWERED: Any = _Answered()


class _Whole:
    """A response's way out: its head leaves with the first piece of its body.

    uvicorn writes the two apart, and each is a call of the system and a packet that wakes the client.
    """

    def __init__(self, transport: asyncio.Transport, answered: Callable[[], None]) -> None:
        self._transport = transport
        self._answered = answered
        self._head = b""
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write ``data``, or keep it back where it is the head of the final response."""
        if not self._begun and not data.startswith(b"HTTP/1.1 1"):  # a client waits for 100 Continue
            self._begun, self._head = True, data
            return
        head, self._head = self._head, b""
        self._transport.write(head + data if head else data)

    def _flush(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close the connection once what was kept back is written."""
        self._flush()
        self._transport.close()

    def on_response(self) -> None:
        """The response is complete: one without a body has only its head."""
        self._flush()
        self._answered()


class Connection(HttpToolsProtocol):
    """One connection; subclasses made by :func:`connections` carry the door and the limits."""

    door: Door | None = None
    head_timeout_s = 10.0
    max_head_bytes = 65_536

    _default_headers: list[tuple[bytes, bytes]] | None = None  # those that _end was written from
    _end = b""
    _late: asyncio.TimerHandle | None = None  # closes the connection when it fires
    _in_head = True  # from the connection, or a request's first byte, to the end of its headers
    _in_body = False
    _head_bytes = 0
    _passage: Passage | None = None  # of the request at hand

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser, unless the head is too long; then time a head that is still open."""
        if not self._in_body and self._head_bytes + len(data) > self.max_head_bytes:
            end = data.find(b"\r\n\r\n")
            if self._head_bytes + (len(data) if end < 0 else end) > self.max_head_bytes:
                self._refuse_head()
                return
        super().data_received(data)
        if self._in_body and self._passage is not None:
            self._passage.unexpect()
        if self.parser is None or self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        # Bytes that begin nothing (empty lines), and those of a body that is skipped, have also ended
        # the wait of an idle connection.
        if self._in_head or (not self._busy() and (self._in_body or self.timeout_keep_alive_task is None)):
            self._start_clock()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head, self._in_body = False, True
        self._head_bytes = 0
        self._stop_clock()
        if self._refuse():
            return
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            whole: Any = _Whole(self.transport, self.cycle.on_response)
            self.cycle.transport, self.cycle.on_response = whole, whole.on_response
        elif self._passage is not None:  # no request was made of it
            self._passage.leave()
            self._passage = None

    def on_message_complete(self) -> None:
        """The body is whole."""
        self._in_body = False
        self._stop_clock()
        super().on_message_complete()
        if not self._busy() and self.timeout_keep_alive_task is None:  # answered before its body ended
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """The answer is written; what is left of an unread body has the time of a head."""
        super().on_response_complete()
        if self._in_body and self.cycle is not _ANSWERED and not self.transport.is_closing():
            self._start_clock()

    def _refuse(self) -> bool:
        """Ask the door; where it refuses, write the answer and keep the connection."""
        self._passage = None
        if self._busy() or self.expect_100_continue or not self.parser.should_keep_alive():
            return False  # the order of answers, and how the connection ends, are uvicorn's to keep
        door, headers = self.door, self.headers
        path = self.url.partition(b"?")[0].decode("latin-1")
        refused = door.ask(self.parser.get_method().decode("ascii"), path, headers) if door else None
        if not isinstance(refused, Refused):
            self._passage = refused
            if refused is not None:
                self.scope["state"]["passage"] = refused
            return False
        kind = type(self)
        if kind._default_headers is not self.server_state.default_headers:  # another list each second
            kind._default_headers = self.server_state.default_headers
            lines = b"".join(b"%b: %b\r\n" % line for line in kind._default_headers)
            kind._end = b"\r\n%b\r\n" % lines
        self.cycle = _ANSWERED
        self.transport.write(b"".join((refused.head, request_id(headers), kind._end, refused.body)))
        if refused.closes:
            self.transport.close()
        self.on_response_complete()
        return True

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_clock(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_timeout_s, self._close_late)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close_late(self) -> None:
        self._late = None
        if self._busy():  # an earlier request on this connection is still being answered
            self._start_clock()
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse_head(self) -> None:
        message = f"The request line and headers are over {self.max_head_bytes} bytes (--max-head-bytes)."
        body = json.dumps({"error": message}).encode()
        head = (
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()


def connections(door: Door, timeout_s: float, max_bytes: int) -> type[Connection]:
    """Return the protocol with its door, and the seconds and bytes of a request's line and headers."""
    fields = {"door": door, "head_timeout_s": timeout_s, "max_head_bytes": max_bytes}
    return type("BoundConnection", (Connection,), fields)
