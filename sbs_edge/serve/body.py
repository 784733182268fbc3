"""Read a request's body within its size limit (after decompression), its JSON, and its deadline header."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from sbs_edge.serve import errors

__all__ = ["deadline_s", "parse_json", "read_body"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# A shorter deadline would always expire: it is below the time of any request.
_SHORTEST_S = 0.01

# zlib's window argument: gzip framing, zlib framing, and raw deflate, which some clients send for
# "deflate" although RFC 9110 means the zlib format.
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class _Inflater:
    """Decompresses piece by piece; holds at most ``limit`` bytes of output."""

    def __init__(self, encoding: str, limit: int) -> None:
        self._encoding = encoding
        self._limit = limit
        self._engine: Any = zlib.decompressobj(_GZIP) if encoding == "gzip" else None
        self._out = bytearray()

    @property
    def size(self) -> int:
        return len(self._out)

    def feed(self, piece: bytes) -> None:
        if not piece:
            return
        if self._engine is None:
            first_is_zlib = piece[0] & 0x0F == 8 and piece[0] >> 4 <= 7
            self._engine = zlib.decompressobj(_ZLIB if first_is_zlib else _RAW)
        try:
            self._out += self._engine.decompress(piece, self._limit + 1 - len(self._out))
        except zlib.error as error:
            raise errors.bad_request(f"The body is not valid {self._encoding} data: {error}.") from error
        if len(self._out) > self._limit:
            raise errors.too_large(self._limit)

    def finish(self) -> bytes:
        if self._engine is None or not self._engine.eof:
            raise errors.bad_request(f"The {self._encoding} body is cut short.")
        if self._engine.unused_data:
            raise errors.bad_request(f"The {self._encoding} body is followed by other bytes.")
        return bytes(self._out)


async def read_body(
    receive: Receive, headers: Mapping[str, str], limit: int, hold: Callable[[int], None]
) -> bytes:
    """Return the decompressed body; stop reading as soon as it is over ``limit`` bytes.

    ``hold`` is called with the number of bytes kept of each piece, and may raise.

    Raises:
        HttpError: 413 over the limit, 415 for an unknown ``Content-Encoding``, 400 for broken data.
        ClientLeft: the connection closed before the body was complete.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower() or "identity"
    if encoding not in ("identity", "gzip", "deflate"):
        raise errors.HttpError(415, "Content-Encoding must be gzip, deflate or identity.")
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise errors.too_large(limit)
    inflater = _Inflater(encoding, limit) if encoding != "identity" else None
    raw = bytearray()
    received = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.ClientLeft
        piece = message.get("body", b"")
        received += len(piece)
        if received > limit:
            raise errors.too_large(limit)
        if inflater:
            before = inflater.size
            inflater.feed(piece)
            hold(inflater.size - before)
        else:
            hold(len(piece))
            raw += piece
        if not message.get("more_body", False):
            return inflater.finish() if inflater else bytes(raw)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is given more than once")
            seen.add(key)
    return found


def parse_json(body: bytes) -> Any:
    r"""Parse strict UTF-8 JSON; every failure, deep nesting included, is a 400.

    Duplicate keys are rejected, because parsers disagree about which one counts.
    Lone surrogate escapes (``"\ud800"``) are rejected, because they cannot be encoded in UTF-8.
    """
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_object)
        if b"\\u" in body:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise errors.bad_request("The JSON is nested too deeply.") from error
    except UnicodeEncodeError as error:
        raise errors.bad_request("The JSON holds a lone surrogate, which is not text.") from error
    except ValueError as error:
        raise errors.bad_request(f"The body is not valid JSON: {error}.") from error
    return content


def deadline_s(headers: Mapping[str, str], default_s: float) -> float:
    """Return the time that a request may take, in seconds.

    ``X-Request-Timeout-Ms`` (milliseconds) or ``Request-Timeout`` (seconds) shorten or lengthen the server's
    default, up to 10 times of it.
    """
    for name, scale in (("x-request-timeout-ms", 1e-3), ("request-timeout", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            value = float(text) * scale
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < _SHORTEST_S:
            raise errors.bad_request(
                f"The header {name} must be a number of at least {_SHORTEST_S / scale:g}."
            )
        return min(value, 10 * default_s)
    return default_s
