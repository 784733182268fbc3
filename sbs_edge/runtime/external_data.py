"""Find the files that a graph takes its constants from, in the bytes of the ONNX file.

A graph may name any path as the place of its constants, and a runtime would read it. So the names are
checked before a runtime sees the graph. Only the fields that lead to such names are decoded (field
numbers from onnx.proto); everything else is skipped by its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sbs_edge.errors import IntegrityError

__all__ = ["external_locations", "inlined"]

# message -> {field number: message inside it}; an attribute's tensors and graphs are included, so the
# bodies of loops and conditions are searched too.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_MAX_DEPTH = 64


class _Malformed(Exception):
    pass


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Malformed
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _messages(data: memoryview, wanted: Mapping[int, str]) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            _, at = _varint(data, at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise _Malformed
            if field in wanted:
                yield field, data[at : at + size]
            at += size
        else:
            raise _Malformed
    if at != len(data):
        raise _Malformed


def _search(data: memoryview, kind: str, depth: int, found: set[str]) -> None:
    if depth > _MAX_DEPTH:
        raise _Malformed
    inside = _FIELDS[kind]
    for field, part in _messages(data, inside):
        if inside[field] != "entry":
            _search(part, inside[field], depth + 1, found)
            continue
        entry = {number: bytes(text) for number, text in _messages(part, {1: "key", 2: "value"})}
        if entry.get(1) == b"location":
            found.add(entry.get(2, b"").decode("utf-8"))


def external_locations(content: bytes, name: str) -> set[str]:
    """Return every external-data location that the ONNX file ``content`` names.

    Args:
        content: the serialised model.
        name: what to call it in a message.

    Raises:
        IntegrityError: the bytes are not a well-formed ONNX model.
    """
    found: set[str] = set()
    try:
        _search(memoryview(content), "model", 0, found)
    except (_Malformed, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{name} is not a well-formed ONNX file; export the bundle again from the student."
        ) from error
    return found


def inlined(content: bytes, constants: Mapping[str, bytes]) -> bytes:
    """Return the ONNX file with its external constants inside, those of loop bodies included.

    onnxruntime takes external constants from memory only for the outermost graph.

    Args:
        content: the serialised model, under 2 GB with its constants.
        constants: location -> the content of that file.

    Raises:
        IntegrityError: the bytes are not a well-formed ONNX model, or a constant lies outside its file.
    """
    try:
        return b"".join(_rebuilt(memoryview(content), "model", 0, constants))
    except (_Malformed, ValueError, KeyError) as error:
        raise IntegrityError(
            "A graph needs constants that its files do not contain; export the bundle again from the student."
        ) from error


_RAW_DATA, _EXTERNAL, _LOCATION = 9, 13, 14  # fields of a tensor


def _rebuilt(
    data: memoryview, kind: str, depth: int, constants: Mapping[str, bytes]
) -> Iterator[bytes | memoryview]:
    """Yield the parts of a message, its tensors' external constants replaced by their bytes."""
    if depth > _MAX_DEPTH:
        raise _Malformed
    entries: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 2:
            size, at = _varint(data, at)
            part, at = data[at : at + size], at + size
        elif wire == 0:
            _, at = _varint(data, at)
        else:
            at += {1: 8, 5: 4}[wire]
        if at > len(data):
            raise _Malformed
        if kind == "tensor" and field == _EXTERNAL:
            entry = {number: bytes(text) for number, text in _messages(part, {1: "key", 2: "value"})}
            entries[entry.get(1, b"")] = entry.get(2, b"")
        elif kind == "tensor" and field == _LOCATION:
            continue
        elif wire == 2 and field in _FIELDS[kind]:
            inside = b"".join(_rebuilt(part, _FIELDS[kind][field], depth + 1, constants))
            yield _number(key) + _number(len(inside))
            yield inside
        else:
            yield data[start:at]
    if entries:
        whole = constants[entries[b"location"].decode("utf-8")]
        offset = int(entries.get(b"offset") or 0)
        length = int(entries.get(b"length") or len(whole) - offset)
        if not 0 <= offset <= offset + length <= len(whole):
            raise _Malformed
        yield _number(_RAW_DATA << 3 | 2) + _number(length)
        yield memoryview(whole)[offset : offset + length]


def _number(value: int) -> bytes:
    """Return a protobuf varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
