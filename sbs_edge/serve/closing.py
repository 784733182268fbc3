"""The end of a connection: time limits, and a close that does not lose the last response.

A request's head must arrive within a time limit, and so must the rest of a body whose request has been answered.
A client that does not read its response has the same time.

A connection that ends while its client still sends is closed in two steps. The response and the end of the
stream are sent first, and what still arrives is discarded for a while. An immediate close would make the system
reset the connection, and the client would lose the response.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["LINGER_BYTES", "ClosingConnection"]

# Before a connection is closed, so many more bytes and seconds of its client are discarded.
LINGER_BYTES = 16 << 20
_LINGER_S = 5.0


class ClosingConnection(HttpToolsProtocol):
    """An HTTP connection with time limits that closes in two steps."""

    head_timeout_s = 10.0

    _late: asyncio.TimerHandle | None = None  # closes the connection when it fires
    _unread: asyncio.TimerHandle | None = None  # closes the connection unless the client reads
    _in_body = False
    _held = b""  # bytes that follow the current request
    _lingered: int | None = None  # bytes discarded since the connection ended

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_clock()
        self._stop_unread()
        self._held = b""
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Give a client that does not read the time limit of a head."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_clock(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(self.head_timeout_s, self._close_late)

    def _stop_clock(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _close_late(self) -> None:
        self._late = None
        if self._busy():  # an earlier request on this connection is still being answered
            self._start_clock()
        elif not self.transport.is_closing():
            self.transport.close()

    def _ended(self) -> bool:
        return self.parser is None or self._lingered is not None or self.transport.is_closing()

    def _close(self) -> None:
        """Close the connection, in two steps if the client may still be sending."""
        if self._in_body or self._held:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Send the end of the stream, and discard for a while what still arrives."""
        if self._lingered is not None or self.transport.is_closing():
            return
        self._lingered, self._held = len(self._held), b""
        self._stop_clock()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        if self.transport.can_write_eof():  # not under TLS
            self.transport.write_eof()
        flow: Any = self.flow
        flow.held = False
        flow.resume_reading()
        self._late = self.loop.call_later(_LINGER_S, self.transport.close)
