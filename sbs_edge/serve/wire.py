"""Parts of a connection: combined writes, paused reading, and a check for ambiguous heads."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl

from sbs_edge.serve import errors

__all__ = ["ANSWERED", "HeldFlow", "WholeWriter", "check_fields"]


class _Answered:
    """Takes the place of uvicorn's current request once that has been answered."""

    response_complete = True

    class message_event:
        """An event without waiters."""

        @staticmethod
        def set() -> None:
            """Do nothing."""


ANSWERED: Any = _Answered()


# A request with two values for one of these headers is ambiguous.
_ONCE = frozenset(
    {
        b"host", b"authorization", b"content-encoding", b"content-length", b"x-request-id",
        b"request-timeout", b"x-request-timeout-ms", b"inference-header-content-length",
    }
)  # fmt: skip


def check_fields(version: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise 400 for a head that is ambiguous: RFC 9112 requires one Host, and none of these fields is a list."""
    names = {name for name, _ in headers}
    if len(names) != len(headers):
        counts = Counter(name for name, _ in headers)
        twice = sorted(name.decode() for name in _ONCE if counts[name] > 1)
        if twice:
            raise errors.malformed(f"The header {twice[0]} is given more than once.")
    if b"host" not in names and version == "1.1":
        raise errors.malformed("An HTTP/1.1 request needs a Host header.")


class HeldFlow(FlowControl):
    """Flow control that pauses reading while bytes of later requests are held back."""

    held = False

    def resume_reading(self) -> None:
        """Resume reading, unless bytes are held back."""
        if not self.held:
            super().resume_reading()


class WholeWriter:
    """Writes the head of a response together with the first piece of its body.

    uvicorn writes the two separately; each write is a system call and a packet that wakes the client.
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
        """Write ``data``, or hold it back if it is the head of the final response."""
        if not self._begun and not data.startswith(b"HTTP/1.1 1"):  # a client may wait for 100 Continue
            self._begun, self._head = True, data
            return
        head, self._head = self._head, b""
        self._transport.write(head + data if head else data)

    def _flush(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Write what was held back, and close the connection."""
        self._flush()
        self._close()

    def on_response(self) -> None:
        """Finish the response; one without a body has only its head."""
        self._flush()
        self._answered()
