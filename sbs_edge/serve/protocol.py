"""HTTP/1.1 connections: uvicorn's httptools protocol, with a door and the limits it leaves to a proxy.

Work there is no room for is refused here, as soon as its head is parsed: no task, no routing, one write.
The connection stays open, and what comes of the body is skipped.

A request's line and headers must arrive within a time and within a size; otherwise a client that sends
one byte a minute, or headers without end, holds a connection or the memory of the process. Bodies are
bounded where they are read (:mod:`sbs_edge.serve.body`); the rest of a body whose request was already
answered has the time of a head.

Requests of one connection are answered one after the other. Bytes that follow the request at hand stay
unparsed, and nothing more is read, until it is answered and its answer has left: a client that sends
without reading costs one read of its socket, however much it sends.

A connection that ends while its client still sends is closed in two steps: the answer and the end of the
stream leave first, and what still arrives is thrown away for a while. Closing at once would make the
system reset the connection, and the client would lose the answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from sbs_edge.serve import errors
from sbs_edge.serve.admission import AdmissionSlot
from sbs_edge.serve.admission_filter import AdmissionFilter, Refused, prepare, request_id
from sbs_edge.serve.wire import ANSWERED, HeldFlow, WholeWriter, check_fields

__all__ = ["Connection", "connections"]


# A connection that ends takes so many more bytes and seconds of its client before it is closed.
_LINGER_BYTES = 16 << 20
_LINGER_S = 5.0

_MAX_HEADERS = 256
_PIECES_A_TURN = 64  # then other connections have their turn
# Pieces of a body are cut where a head could end, but not smaller than this: the cuts are there for
# requests that follow the body, and a body made of line ends must not cost a call for every few bytes.
_SMALLEST_BODY_PIECE = 1024

_CONNECTION_ONLY = (b"upgrade", b"http2-settings")


class Connection(HttpToolsProtocol):
    """One connection; subclasses made by :func:`connections` carry the door and the limits."""

    door: AdmissionFilter | None = None
    head_timeout_s = 10.0
    max_head_bytes = 65_536
    max_connections = 2048

    _default_headers: list[tuple[bytes, bytes]] | None = None  # those that _end was written from
    _end = b""
    _late: asyncio.TimerHandle | None = None  # closes the connection when it fires
    _unread: asyncio.TimerHandle | None = None  # closes it unless the client reads
    _in_head = True  # from the connection, or a request's first byte, to the end of its headers
    _in_body = False
    _head_bytes = 0
    _body_bytes = 0  # of the body at hand
    _framing_bytes = 0  # what chunks and trailers cost beside it
    _passage: AdmissionSlot | None = None  # of the request at hand
    _held = b""  # bytes that follow the request at hand
    _feeding = False
    _upgrading = False  # the head just parsed asks for another protocol
    _last: errors.HttpError | None = None  # ends the connection once earlier requests are answered
    _lingered: int | None = None  # bytes thrown away since the connection ended

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        self.flow = HeldFlow(transport)
        if len(self.connections) > self.max_connections:
            self._finish(errors.too_many_connections(self.max_connections))
            transport.close()  # at once: those that linger are connections too
            return
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._stop_clock()
        self._stop_unread()
        self._held = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser with what belongs to the request at hand; hold the rest back."""
        if self._lingered is not None:
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self.transport.close()
            return
        self._held = self._held + data if self._held else data
        if not self._feeding:
            self._feed()

    def _feed(self) -> None:
        """Parse up to the end of a request that has to be answered first."""
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
        if self._in_body and self._passage is not None:
            self._passage.unexpect()
        # Bytes that begin nothing (empty lines), and those of a body that is skipped, have also ended
        # the wait of an idle connection.
        if self._in_head or (not self._busy() and (self._in_body or self.timeout_keep_alive_task is None)):
            self._start_clock()

    def _piece_end(self, data: bytes, at: int) -> int:
        """Return where the next piece ends: where a head may end, so that it brings one further request at most."""
        if not self._in_body and not at and self._head_bytes:
            return min(len(data), 3)  # the end of a head may lie across two reads
        cut = data.find(b"\r\n\r\n", at + _SMALLEST_BODY_PIECE if self._in_body else max(at - 3, 0))
        return len(data) if cut < 0 else cut + 4

    def _parse(self, piece: bytes) -> int:
        """Give one piece to the parser; return how many of its bytes are used up."""
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
        if in_body and self._in_body and self.headers is headers:  # one and the same body
            self._framing_bytes += len(piece) - (self._body_bytes - before)
            if self._framing_bytes > self.max_head_bytes + 8 * self._body_bytes:
                self._end_with(errors.long_head(self.max_head_bytes))
        elif self._in_head:
            self._head_bytes += len(piece)
        return len(piece)

    def _stay(self, used: int) -> int:
        """Answer in HTTP/1.1 what asked for another protocol: parse its head again without the wish.

        The parser takes whatever follows such a head for the other protocol, the body too.
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
        """Whether the next byte may be parsed: the request at hand is whole and answered, or in its body."""
        if self._ended() or self._last is not None:
            return False
        if self.pipeline:
            return False
        return self._in_body or not (self._busy() or self.flow.write_paused)

    def _ended(self) -> bool:
        return self.parser is None or self._lingered is not None or self.transport.is_closing()

    def _hold(self, rest: bytes) -> None:
        """Keep ``rest`` for later; read nothing more until then."""
        self._held = rest
        flow: Any = self.flow
        before, flow.held = flow.held, bool(rest) or (self.flow.write_paused and not self._in_body)
        if flow.held:
            flow.pause_reading()
        elif before:
            flow.resume_reading()

    def _continue(self) -> None:
        """Parse what was held back, if it may be."""
        if not self._feeding and not self._ended() and self._may_read():
            self._feed()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; trailers are not headers and are left out."""
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
            self.expect_100_continue = False  # such a client knows no interim answers
            self.scope["state"]["keep_alive"] = self.parser.should_keep_alive()
        if self._refuse(version):
            return
        before = self.cycle
        try:
            super().on_headers_complete()
        except Exception:
            self._in_body = False  # there will be an answer, but no request
            raise
        finally:
            if self.cycle is not before:
                whole: Any = WholeWriter(self.transport, self.cycle.on_response, self._close)
                self.cycle.transport, self.cycle.on_response = whole, whole.on_response
            elif self._passage is not None:  # no request was made of it
                self._passage.leave()
                self._passage = None
        if version == "1.0":
            self.cycle.keep_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole."""
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
        """The answer is written; what is left of an unread body has the time of a head."""
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

    def pause_writing(self) -> None:
        """The client does not read: it has the time of a head to go on."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.head_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop_unread()
        if not self._ended():
            self._hold(self._held)
            if self._held:
                self._continue()

    def shutdown(self) -> None:
        """Close with the server, unless an answer is still on its way out."""
        if self._lingered is None:
            if self._busy():
                self.cycle.keep_alive = False
            else:
                self._close()

    def _refuse(self, version: str) -> bool:
        """Ask the door; where it refuses, write the answer and keep the connection."""
        self._passage = None
        if (
            self._busy()
            or version == "1.0"
            or self.expect_100_continue
            or not self.parser.should_keep_alive()
        ):
            return False  # the order of answers, and how the connection ends, are uvicorn's to keep
        door, headers = self.door, self.headers
        path = self.url.partition(b"?")[0].decode("latin-1")
        refused = door.ask(self.parser.get_method().decode("ascii"), path, headers) if door else None
        if not isinstance(refused, Refused):
            self._passage = refused
            if refused is not None:
                self.scope["state"]["passage"] = refused
            return False
        self.cycle = ANSWERED
        self._write(refused, headers)
        if refused.closes:
            self._close()
        self.on_response_complete()
        return True

    def _write(self, refused: Refused, headers: list[tuple[bytes, bytes]]) -> None:
        kind = type(self)
        if kind._default_headers is not self.server_state.default_headers:  # another list each second
            kind._default_headers = self.server_state.default_headers
            lines = b"".join(b"%b: %b\r\n" % line for line in kind._default_headers)
            kind._end = b"\r\n%b\r\n" % lines
        self.transport.write(b"".join((refused.head, request_id(headers), kind._end, refused.body)))

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

    def _end_with(self, error: errors.HttpError) -> None:
        """Answer with ``error`` in its turn, and end the connection."""
        if self._in_body and self._busy() and not self.pipeline:  # it ends the request at hand
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._finish(error)
        elif self._busy() or self.pipeline:
            self._last = error
            self._stop_clock()
            if self._in_body:  # the broken request itself waits behind another: it has its answer
                self.pipeline.clear()
                self.cycle = ANSWERED
            flow: Any = self.flow
            flow.held = True
            flow.pause_reading()
        elif self._in_body:  # it has its answer
            self._linger()
        else:
            self._finish(error)

    def _finish(self, error: errors.HttpError) -> None:
        """Write ``error`` and end the connection."""
        self._last = None
        if self.door is not None:
            self.door.count(error)
        self._write(prepare(error, closing=True), self.headers or [])
        self._linger()

    def _close(self) -> None:
        """End the connection, slowly where the client may still be sending."""
        if self._in_body or self._held:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Say that nothing more will come, and throw away what still arrives, for a while."""
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


def connections(
    door: AdmissionFilter, timeout_s: float, max_bytes: int, max_connections: int = 2048
) -> type[Connection]:
    """Return the protocol with its door, and the seconds and bytes of a request's line and headers."""
    fields = {
        "door": door,
        "head_timeout_s": timeout_s,
        "max_head_bytes": max_bytes,
        "max_connections": max_connections,
    }
    return type("BoundConnection", (Connection,), fields)
