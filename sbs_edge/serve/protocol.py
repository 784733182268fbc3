"""HTTP/1.1 connections: uvicorn's httptools protocol with an admission filter and limits.

When the server is full, a request is rejected as soon as its head is parsed: no task, no routing, one write. The
connection stays open, and the body is skipped.

The request line and headers have a time limit and a size limit. Otherwise a client could occupy a connection with
one byte per minute, or the memory with endless headers. Bodies are limited where they are read
(:mod:`sbs_edge.serve.body`).

Requests on a connection are answered one after the other. Bytes that follow the current request stay unparsed, and
nothing more is read, until its response has been sent. A client that sends without reading therefore costs one read
of its socket, however much it sends.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools

from sbs_edge.serve import errors
from sbs_edge.serve.admission import AdmissionSlot
from sbs_edge.serve.admission_filter import AdmissionFilter, Rejection, prepare, request_id
from sbs_edge.serve.closing import LINGER_BYTES, ClosingConnection
from sbs_edge.serve.wire import ANSWERED, HeldFlow, WholeWriter, check_fields

__all__ = ["Connection", "connections"]


_MAX_HEADERS = 256
_PIECES_A_TURN = 64  # of a connection; then the event loop serves others
# Pieces of a body end where a head could end, so that a request after the body starts a new piece. They have a
# minimum size, so that a body of line ends does not cost a call for every few bytes.
_SMALLEST_BODY_PIECE = 1024

_CONNECTION_ONLY = (b"upgrade", b"http2-settings")


class Connection(ClosingConnection):
    """One connection; subclasses made by :func:`connections` carry the admission filter and the limits."""

    admission_filter: AdmissionFilter | None = None
    max_head_bytes = 65_536
    max_connections = 2048

    _default_headers: list[tuple[bytes, bytes]] | None = None  # the headers that _end was made from
    _end = b""
    _in_head = True  # until the headers of the next request are complete
    _head_bytes = 0
    _body_bytes = 0  # of the current body
    _framing_bytes = 0  # of chunk headers and trailers
    _slot: AdmissionSlot | None = None  # of the current request
    _feeding = False
    _upgrading = False  # the head just parsed asks for another protocol
    _last: errors.HttpError | None = None  # sent as the last response, once earlier requests are answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time limit of the first request."""
        super().connection_made(transport)
        self.flow = HeldFlow(transport)
        if len(self.connections) > self.max_connections:
            self._finish(errors.too_many_connections(self.max_connections))
            transport.close()  # at once: lingering connections count too
            return
        self._start_clock()

    def data_received(self, data: bytes) -> None:
        """Parse the bytes of the current request; hold the rest back."""
        if self._lingered is not None:
            self._lingered += len(data)
            if self._lingered > LINGER_BYTES:
                self.transport.close()
            return
        self._held = self._held + data if self._held else data
        if not self._feeding:
            self._feed()

    def _feed(self) -> None:
        """Parse up to the end of the current request."""
        self._unset_keepalive_if_required()
        data, at, pieces = self._held, 0, 0
        self._held, self._feeding = b"", True
        try:
            while at < len(data) and self._may_read():
                if pieces == _PIECES_A_TURN:
                    self.loop.call_soon(self._continue)
                    break
                pieces += 1
                end = self._piece_end(data, at)
                piece = data[at:end] if end - at < len(data) else data
                if not self._in_body and self._head_bytes + len(piece) > self.max_head_bytes:
                    self._end_with(errors.long_head(self.max_head_bytes))
                    return
                at += self._parse(piece)
        finally:
            self._feeding = False
        if self._ended():
            return
        rest = data[at:] if at else data
        self._hold(rest + self._held if self._held else rest)
        if self._in_body and self._slot is not None:
            self._slot.withdraw_estimate()
        # Empty lines, and bytes of a body that is skipped, have also stopped the keep-alive timer.
        if self._in_head or (not self._busy() and (self._in_body or self.timeout_keep_alive_task is None)):
            self._start_clock()

    def _piece_end(self, data: bytes, at: int) -> int:
        """Return the end of the next piece; it ends where a head may end, so that it completes at most one head."""
        if not self._in_body and not at and self._head_bytes:
            return min(len(data), 3)  # the end of a head may be split between two reads
        cut = data.find(b"\r\n\r\n", at + _SMALLEST_BODY_PIECE if self._in_body else max(at - 3, 0))
        return len(data) if cut < 0 else cut + 4

    def _parse(self, piece: bytes) -> int:
        """Parse a piece; return the number of bytes that were consumed."""
        before, headers = self._body_bytes, self.headers
        in_body = self._in_body
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            return self._stay(upgrade.args[0])
        except httptools.HttpParserError as error:
            reason = error.__context__
            if not isinstance(reason, errors.HttpError):
                reason = errors.malformed("The request is not valid HTTP/1.1.")
            self._end_with(reason)
            return len(piece)
        if in_body and self._in_body and self.headers is headers:  # still the same body
            self._framing_bytes += len(piece) - (self._body_bytes - before)
            if self._framing_bytes > self.max_head_bytes + 8 * self._body_bytes:
                self._end_with(errors.long_head(self.max_head_bytes))
        elif self._in_head:
            self._head_bytes += len(piece)
        return len(piece)

    def _stay(self, used: int) -> int:
        """Ignore a request's wish for another protocol: parse its head again without it.

        The parser takes everything after such a head, the body included, for data of the other protocol.
        """
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in _CONNECTION_ONLY)
                if not value:
                    continue
            if name not in _CONNECTION_ONLY:
                lines.append(b"%b: %b" % (name, value))
        self._upgrading = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._parse(b"\r\n".join([*lines, b"", b""]))
        return used

    def _may_read(self) -> bool:
        """Return whether the next byte may be parsed: it belongs to the current body, or no request is unanswered."""
        if self._ended() or self._last is not None:
            return False
        if self.pipeline:
            return False
        return self._in_body or not (self._busy() or self.flow.write_paused)

    def _hold(self, rest: bytes) -> None:
        """Keep ``rest`` for later, and pause reading until then."""
        self._held = rest
        flow: Any = self.flow
        before, flow.held = flow.held, bool(rest) or (self.flow.write_paused and not self._in_body)
        if flow.held:
            flow.pause_reading()
        elif before:
            flow.resume_reading()

    def _continue(self) -> None:
        """Parse the bytes held back, if they may be parsed now."""
        if not self._feeding and not self._ended() and self._may_read():
            self._feed()

    def on_message_begin(self) -> None:
        """Note the first byte of a request."""
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header; trailers are ignored."""
        if self._in_body:
            return
        if len(self.headers) == _MAX_HEADERS:
            raise errors.many_headers(_MAX_HEADERS)
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise errors.malformed("This server is not a proxy: CONNECT is not served.", 405)
            self._upgrading = True
            return
        version = self.parser.get_http_version()
        check_fields(version, self.headers)
        self._in_head, self._in_body = False, True
        self._head_bytes = self._body_bytes = self._framing_bytes = 0
        self._stop_clock()
        if version == "1.0":
            self.expect_100_continue = False  # HTTP/1.0 has no interim responses
            self.scope["state"]["keep_alive"] = self.parser.should_keep_alive()
        if self._refuse(version):
            return
        before = self.cycle
        try:
            super().on_headers_complete()
        except Exception:
            self._in_body = False  # there will be a response, but no request
            raise
        finally:
            if self.cycle is not before:
                whole: Any = WholeWriter(self.transport, self.cycle.on_response, self._close)
                self.cycle.transport, self.cycle.on_response = whole, whole.on_response
            elif self._slot is not None:  # no request was created
                self._slot.leave()
                self._slot = None
        if version == "1.0":
            self.cycle.keep_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Add a piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note the end of the body."""
        if self._upgrading:
            return
        self._in_body = False
        self._stop_clock()
        super().on_message_complete()
        if not self._busy() and self.timeout_keep_alive_task is None:  # answered before its body ended
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Go on after a response; the rest of an unread body has the time limit of a head."""
        if self._lingered is not None:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._in_body and self.cycle is not ANSWERED:
            self._start_clock()
        if self._last is not None and not self._busy() and not self.pipeline:
            self._finish(self._last)
        elif self._held:
            self._continue()

    def resume_writing(self) -> None:
        """Go on once the client reads again."""
        super().resume_writing()
        self._stop_unread()
        if not self._ended():
            self._hold(self._held)
            if self._held:
                self._continue()

    def shutdown(self) -> None:
        """Close the connection, unless a response is still being sent."""
        if self._lingered is None:
            if self._busy():
                self.cycle.keep_alive = False
            else:
                self._close()

    def _refuse(self, version: str) -> bool:
        """Ask the admission filter; write its rejection, if there is one, and keep the connection."""
        self._slot = None
        if (
            self._busy()
            or version == "1.0"
            or self.expect_100_continue
            or not self.parser.should_keep_alive()
        ):
            return False  # uvicorn keeps the order of responses and ends the connection
        admission_filter, headers = self.admission_filter, self.headers
        path = self.url.partition(b"?")[0].decode("latin-1")
        method = self.parser.get_method().decode("ascii")
        admitted = admission_filter.admit(method, path, headers) if admission_filter else None
        if not isinstance(admitted, Rejection):
            self._slot = admitted
            if admitted is not None:
                self.scope["state"]["slot"] = admitted
            return False
        self.cycle = ANSWERED
        self._write(admitted, headers)
        if admitted.closes:
            self._close()
        self.on_response_complete()
        return True

    def _write(self, rejection: Rejection, headers: list[tuple[bytes, bytes]]) -> None:
        kind = type(self)
        if (
            kind._default_headers is not self.server_state.default_headers
        ):  # uvicorn makes a new list each second
            kind._default_headers = self.server_state.default_headers
            lines = b"".join(b"%b: %b\r\n" % line for line in kind._default_headers)
            kind._end = b"\r\n%b\r\n" % lines
        self.transport.write(b"".join((rejection.head, request_id(headers), kind._end, rejection.body)))

    def _end_with(self, error: errors.HttpError) -> None:
        """Answer with ``error`` after earlier responses, and end the connection."""
        if self._in_body and self._busy() and not self.pipeline:  # it ends the current request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._finish(error)
        elif self._busy() or self.pipeline:
            self._last = error
            self._stop_clock()
            if self._in_body:  # the broken request waits behind another; this is its response
                self.pipeline.clear()
                self.cycle = ANSWERED
            flow: Any = self.flow
            flow.held = True
            flow.pause_reading()
        elif self._in_body:  # the request has been answered
            self._linger()
        else:
            self._finish(error)

    def _finish(self, error: errors.HttpError) -> None:
        """Write ``error`` and end the connection."""
        self._last = None
        if self.admission_filter is not None:
            self.admission_filter.count(error)
        self._write(prepare(error, closing=True), self.headers or [])
        self._linger()


def connections(
    admission_filter: AdmissionFilter, timeout_s: float, max_bytes: int, max_connections: int = 2048
) -> type[Connection]:
    """Return the protocol class; ``timeout_s`` and ``max_bytes`` limit a request line and its headers."""
    fields = {
        "admission_filter": admission_filter,
        "head_timeout_s": timeout_s,
        "max_head_bytes": max_bytes,
        "max_connections": max_connections,
    }
    return type("BoundConnection", (Connection,), fields)
