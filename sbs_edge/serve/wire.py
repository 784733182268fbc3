"""Parts of a connection: answers written whole, reading held back, and heads that mean one thing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

from sbs_edge.serve import errors

__all__ = ["ANSWERED", "HeldFlow", "WholeWriter", "check_fields"]


class _Answered:
    """Stands where uvicorn keeps the request at hand: one that has been answered."""

    response_complete = True

    class message_event:
        """Nobody waits for the rest of it."""

        @staticmethod
        def set() -> None:
            """Wake nobody."""


ANSWERED: Any = _Answered()


# A request that names one of these twice means two things; which one counts would be left to chance.
_ONCE = frozenset(
    {
        b"host", b"authorization", b"content-encoding", b"content-length", b"x-request-id",
        b"request-timeout", b"x-request-timeout-ms", b"inference-header-content-length",
    }
)  # fmt: skip


def check_fields(version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise 400 for a head that is ambiguous: RFC 9112 wants one Host, and no field here is a list."""
    names = {name for name, _ in headers}
    if len(names) != len(headers):
        counts = Counter(name for name, _ in headers)
        twice = sorted(name.decode() for name in _ONCE if counts[name] > 1)
        if twice:
            raise errors.malformed(f"The header {twice[0]} is given more than once.")
    if b"host" not in names and version == "1.1":
        raise errors.malformed("An HTTP/1.1 request needs a Host header.")


class HeldFlow(FlowControl):
    """Flow control that reads nothing while bytes of later requests are held back."""

    held = False

    def resume_reading(self) -> None:
        """Read again, unless bytes are held back."""
        if not self.held:
            super().resume_reading()


class WholeWriter:
    """A response's way out: its head leaves with the first piece of its body.

    uvicorn writes the two apart, and each is a call of the system and a packet that wakes the client.
    """

    def __init__(
        self, transport: asyncio.Transport, answered: Callable[[], None], close: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._answered = answered
        self._close = close
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
        self._close()

    def on_response(self) -> None:
        """The response is complete: one without a body has only its head."""
        self._flush()
        self._answered()
