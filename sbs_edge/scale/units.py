"""Divide input files into units of work, each of which gives an output shard.

A unit of JSON Lines is a byte range with the lines that *start* in it, so that a file is divided
without being read. A unit of Parquet is a run of row groups. The plan is a pure function of the
files, so that a run that is started again has the same units and skips those whose shard exists.
This module knows nothing of Ray, students or teachers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from sbs_edge import files
from sbs_edge.data.raw import BOM, refuse_foreign_bytes
from sbs_edge.data.rows import json_row, parquet_rows, printable, starts_as_array
from sbs_edge.errors import DataError, MissingExtra, UsageError

__all__ = [
    "SHARD_FORMATS",
    "Folder",
    "Unit",
    "plan_units",
    "read_unit",
    "shard_name",
    "unit_of",
    "write_shard",
]

SHARD_FORMATS = ("jsonl", "parquet")
"""Formats in which shards are written."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a file.

    Attributes:
        index: place in the plan, from 0.
        uri: the file, as a path or a URI that pyarrow understands.
        start, stop: bytes (JSON Lines) or row groups (Parquet), half-open.
        name: the file under the folder that the pattern starts from, unique in the input.
    """

    index: int
    uri: str
    start: int
    stop: int
    name: str

    @property
    def place(self) -> str:
        """Return its place, for messages."""
        return f"{self.uri}, {'row groups' if _is_parquet(self.uri) else 'bytes'} {self.start} to {self.stop}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for Ray Data."""
        return asdict(self)


def unit_of(batch: dict[str, Any]) -> Unit:
    """Return the unit in a Ray Data batch of one row (columns of length 1, numpy scalars)."""
    return Unit(**{k: v[0].item() if hasattr(v[0], "item") else v[0] for k, v in batch.items()})


def _filesystem(uri: str) -> tuple[Any, str]:
    try:
        from pyarrow import fs
    except ImportError as error:
        raise MissingExtra("pyarrow", "scale", "Working with shards") from error
    if "://" in uri:
        filesystem, path = fs.FileSystem.from_uri(uri)
        return filesystem, path
    return fs.LocalFileSystem(), uri


@contextlib.contextmanager
def _named(uri: str) -> Iterator[None]:
    """Add the name of the file to the error that it cannot be read as Parquet."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split()).rstrip(". ")
        raise DataError(
            f"{uri} cannot be read as Parquet: {said}. Check that it can be reached, or write it again."
        ) from error


def _is_parquet(uri: str) -> bool:
    return uri.lower().endswith(".parquet")


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether path components match those of a pattern; ``**`` matches any number of them."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_fits(path[n:], pattern[1:]) for n in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _fits(path[1:], pattern[1:])


def _listed(pattern: str) -> list[tuple[str, int, str]]:
    """Return (uri, bytes, name) of the files that a path, a directory or a pattern names, by uri."""
    from pyarrow import fs

    scheme, mark, rest = pattern.rpartition("://")
    parts = rest.split("/")
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    # Only the part before the first wildcard is parsed as a path: in a URI, "?" would start a query.
    base = scheme + mark + ("/".join(parts[:first]) or ("." if first == 0 else "/"))
    wanted = parts[first:]
    filesystem, root = _filesystem(base)
    prefix = base[: len(base) - len(root)] if mark else ""
    try:
        if wanted:
            deep = len(wanted) > 1
            infos = filesystem.get_file_info(fs.FileSelector(root, allow_not_found=True, recursive=deep))
        else:
            infos = filesystem.get_file_info([root])
            if infos[0].type == fs.FileType.Directory:
                infos = filesystem.get_file_info(fs.FileSelector(root))
            else:
                root = root.rpartition("/")[0]
        files = [(info.path, info.size) for info in infos if info.type == fs.FileType.File]
    except UnicodeError as error:
        raise UsageError(
            f"The name of a file under {printable(base)} is not UTF-8, so pyarrow cannot open it. Rename it."
        ) from error
    found = []
    for path, size in files:
        name = path.removeprefix(root).lstrip("/")
        is_data = name.lower().endswith((".jsonl", ".ndjson", ".json", ".parquet"))
        if is_data and (not wanted or _fits(name.split("/"), wanted)):
            found.append((prefix + path, size, name))
    if not found:
        raise UsageError(f"No .jsonl or .parquet file matches {pattern}.")
    return sorted(found)


def plan_units(pattern: str, shard_bytes: int) -> list[Unit]:
    """Divide the files that match ``pattern`` into units of about ``shard_bytes`` of input each.

    A pattern may have wildcards in several components (``2026-*/part-*.jsonl``), and ``**``.
    """
    if shard_bytes < 1:
        raise UsageError("A shard must have at least one byte of input.")
    pieces: list[tuple[str, int, int, str]] = []
    for uri, size, name in _listed(pattern):
        if _is_parquet(uri):
            pieces += [(*piece, name) for piece in _row_groups(uri, shard_bytes)]
        elif size:
            _refuse_document(uri)
            edges = [*range(0, size, shard_bytes), size]
            pieces += [(uri, a, b, name) for a, b in itertools.pairwise(edges)]
    return [Unit(index, *piece) for index, piece in enumerate(pieces)]


def _refuse_document(uri: str) -> None:
    """Refuse a file that is not JSON Lines in UTF-8, because none of its lines would be a row."""
    filesystem, path = _filesystem(uri)
    with filesystem.open_input_file(path) as handle:
        start = handle.read(4096)
    refuse_foreign_bytes(start[:8], uri)
    if starts_as_array(start):
        raise DataError(
            f"{uri} is one JSON array, which cannot be divided. Write one object per line, or use the local engine."
        )


def _row_groups(uri: str, shard_bytes: int) -> list[tuple[str, int, int]]:
    import pyarrow.parquet as parquet

    filesystem, path = _filesystem(uri)
    with _named(uri), filesystem.open_input_file(path) as handle:
        metadata = parquet.ParquetFile(handle).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    pieces, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        if held and held + size > shard_bytes:
            pieces.append((uri, start, index))
            start, held = index, 0
        held += size
    if held:
        pieces.append((uri, start, len(sizes)))
    return pieces


def read_unit(unit: Unit) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a unit, in order; a line that is not a JSON object is yielded as a message.

    ``place`` is unique in the input and the same on every run: it names rows without an id.
    """
    if _is_parquet(unit.uri):
        yield from _parquet_rows(unit)
    else:
        yield from _json_rows(unit)


def _json_rows(unit: Unit) -> Iterator[tuple[str, Any]]:
    filesystem, path = _filesystem(unit.uri)
    # pyarrow's files cannot read lines; Python's buffer around them can.
    with io.BufferedReader(filesystem.open_input_file(path), 1 << 20) as handle:
        if unit.start > 0:  # a line belongs to the unit of its first byte
            handle.seek(unit.start - 1)
            position = unit.start - 1 + len(handle.readline())
        else:
            position = 0
        while position < unit.stop:
            line = handle.readline()
            if not line:
                return
            start, position = position, position + len(line)
            if not line.removeprefix(BOM).strip():
                continue
            row = json_row(0, line)
            yield (
                f"{unit.name}@{start}",
                f"{row.problem} ({row.detail})" if row.values is None else row.values,
            )


def _parquet_rows(unit: Unit) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as parquet

    filesystem, path = _filesystem(unit.uri)
    number = 0
    with _named(unit.uri), filesystem.open_input_file(path) as handle:
        file = parquet.ParquetFile(handle)
        for batch in file.iter_batches(batch_size=1024, row_groups=list(range(unit.start, unit.stop))):
            for row in parquet_rows(batch):
                yield (
                    f"{unit.name}@{unit.start}.{number}",
                    f"cannot be read ({row})" if isinstance(row, str) else row,
                )
                number += 1


def shard_name(unit: Unit, form: str) -> str:
    """Return the file name of a unit's output, from its index and its input."""
    identity = json.dumps([unit.name, unit.start, unit.stop])
    return f"part-{unit.index:06d}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.{form}"


def write_shard(
    folder: str, name: str, rows: Sequence[dict[str, Any]], columns: Mapping[str, str] | None = None
) -> None:
    """Write a shard so that it exists whole or not at all.

    ``columns`` gives the columns of a Parquet shard with their types, by Arrow's names; None: as the rows have them.
    """
    Folder(folder).write(
        name, _parquet_bytes(rows, columns) if name.endswith(".parquet") else _json_bytes(rows)
    )


class Folder:
    """The output folder of a run: a path, or a URI of an object store that pyarrow understands."""

    def __init__(self, where: str) -> None:
        self.where = where.rstrip("/")
        self.is_remote = "://" in where
        self._filesystem, self._path = _filesystem(self.where)

    def names(self) -> set[str]:
        """Return the names of the files in the folder; empty if there is no such folder."""
        from pyarrow import fs

        found = self._filesystem.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        return {info.base_name for info in found if info.type == fs.FileType.File}

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with self._filesystem.open_input_stream(f"{self._path}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """Replace a file in one step."""
        if self.is_remote:  # in object stores an object appears when it is complete
            with self._filesystem.open_output_stream(f"{self._path}/{name}") as stream:
                stream.write(content)
            return
        files.write_bytes(f"{self._path}/{name}", content)


def _json_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    # A lone surrogate, which UTF-8 cannot encode, becomes its JSON escape.
    text = "".join(files.to_json(row) + "\n" for row in rows)
    return text.encode("utf-8", "backslashreplace")


def _parquet_bytes(rows: Sequence[dict[str, Any]], columns: Mapping[str, str] | None) -> bytes:
    import pyarrow
    import pyarrow.parquet as parquet

    names = columns or dict.fromkeys(name for row in rows for name in row)
    table = {name: _column([row.get(name) for row in rows], names[name]) for name in names}
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(table), sink)
    return sink.getvalue()


def _column(values: list[Any], kind: str | None) -> Any:
    """Return an Arrow array with one type; values without a common type become text, and nested values JSON."""
    import pyarrow

    if kind != "string" and not any(isinstance(value, dict | list) for value in values):
        try:
            return pyarrow.array(values, kind and pyarrow.type_for_alias(kind))
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
            if kind is not None:
                raise
    return pyarrow.array([_as_text(value) for value in values], pyarrow.string())


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
