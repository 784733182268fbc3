"""A raw row, and the checks on bytes that all formats share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sbs_edge.errors import DataError

__all__ = ["BOM", "RawRow", "is_text", "printable", "refuse_foreign_bytes"]

BOM = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8, which is ignored; files joined with ``cat`` also have it in the middle."""

_FOREIGN = {
    b"\x1f\x8b": "is compressed with gzip. Unpack it first, for example with gunzip.",
    b"BZh": "is compressed with bzip2. Unpack it first, for example with bunzip2.",
    b"\xfd7zXZ": "is compressed with xz. Unpack it first, for example with unxz.",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd. Unpack it first, for example with unzstd.",
    b"PK\x03\x04": "is a zip archive or a spreadsheet. Export it as .csv or .jsonl in UTF-8.",
    b"\xff\xfe\x00\x00": "is UTF-32. Convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8.",
    b"\x00\x00\xfe\xff": "is UTF-32. Convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8.",
    b"\xff\xfe": "is UTF-16. Convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8.",
    b"\xfe\xff": "is UTF-16. Convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8.",
}


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file.

    Attributes:
        line: line of the file the row starts at, from 1; the row number where a format has no lines.
        values: column to value, or None if the row could not be decoded.
        raw: the row as text, as far as it is text.
        problem: why it could not be decoded; rows with the same problem are counted together.
        detail: where in the row, for messages.

    """

    line: int
    values: dict[str, Any] | None
    raw: str
    problem: str = ""
    detail: str = ""


def is_text(value: str) -> bool:
    r"""Return whether ``value`` is valid Unicode: JSON can spell a lone surrogate, such as ``"\ud800"``."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(value: str) -> str:
    r"""Return ``value`` with lone surrogates as escapes (``\ud800``), because UTF-8 cannot encode them."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def refuse_foreign_bytes(start: bytes, where: object) -> None:
    """Raise :class:`DataError` if the first bytes of ``where`` show that it is not text in UTF-8."""
    for mark, what in _FOREIGN.items():
        if start.startswith(mark):
            raise DataError(f"{where} {what}")
    if start[1:2] == b"\x00" or start[:1] == b"\x00":  # UTF-16 without a byte order mark
        raise DataError(
            f"{where} has NUL bytes at its beginning, as UTF-16 does. Convert it to UTF-8 and try again."
        )
