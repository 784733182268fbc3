"""Write files so that a crash leaves either the old file or the new one, never a part of one.

Uses only the standard library, because the runtime imports it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from sbs_edge.errors import SbsEdgeError, UsageError

__all__ = [
    "atomic_directory",
    "atomic_writer",
    "check_replaceable",
    "check_writable",
    "fsync_directory",
    "to_json",
    "write_bytes",
    "write_json",
    "write_text",
]


def fsync_directory(path: Path) -> None:
    """Flush a directory entry, so that a rename inside ``path`` survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _replacement(path: str | os.PathLike[str]) -> Iterator[int]:
    """Yield a descriptor whose content becomes ``path`` when the block succeeds."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    fsync_directory(target.parent)


@contextlib.contextmanager
def atomic_writer(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """Yield a UTF-8 text handle whose content becomes ``path`` when the block succeeds."""
    with _replacement(path) as fd, os.fdopen(fd, "w", encoding="utf-8", closefd=False) as handle:
        yield handle


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step: temporary name, flush, rename."""
    with _replacement(path) as fd, os.fdopen(fd, "wb", closefd=False) as handle:
        handle.write(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Replace ``path`` by ``content`` in UTF-8; see :func:`write_bytes`."""
    write_bytes(path, content.encode("utf-8"))


def to_json(content: Any, **options: Any) -> str:
    """Return ``content`` as JSON; ``options`` are those of :func:`json.dumps`.

    Raises:
        SbsEdgeError: a number is NaN or infinite, which JSON cannot represent.
    """
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, **options)
    except ValueError as error:
        place = _not_finite(content, "")
        if place is None:
            raise
        raise SbsEdgeError(
            f"The result has a number that is not finite (NaN or infinity) at {place}, which JSON cannot represent. "
            "Nothing was written. Check the student that produced it."
        ) from error


def _not_finite(content: Any, place: str) -> str | None:
    """Return the place in ``content`` of the first number that is not finite."""
    if isinstance(content, float):
        return None if math.isfinite(content) else place.lstrip(".") or "the top"
    parts: Any = ()
    if isinstance(content, Mapping):
        parts = ((f"{place}.{key}", value) for key, value in content.items())
    elif isinstance(content, list | tuple):
        parts = ((f"{place}[{index}]", value) for index, value in enumerate(content))
    return next((found for name, value in parts if (found := _not_finite(value, name))), None)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON with a final newline, in one step.

    Raises:
        SbsEdgeError: a number is not finite; the file is then unchanged.
    """
    write_text(path, to_json(content, indent=2) + "\n")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise an error before long work if the file ``path`` cannot be written; create its folder.

    Raises:
        UsageError: ``path`` is a directory, or its folder cannot be created or written to.

    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"{target} is a directory, but a file is needed. Name a file.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(
            f"{target} cannot be written: {error.strerror or error}. Choose another path."
        ) from error


def check_replaceable(destination: str | os.PathLike[str], marks: Sequence[str], kind: str) -> None:
    """Reject a destination that has anything but this package's output, because replacing it would delete the rest.

    Args:
        destination: a directory that :func:`atomic_directory` is going to replace.
        marks: glob patterns; an earlier output of the same kind matches one of them.
        kind: what is written, for the message.

    Raises:
        UsageError: it is a file, has other content, or is the working directory of this process.
    """
    target = Path(destination)
    here, resolved = Path.cwd(), target.resolve()
    if resolved == here or resolved in here.parents:
        raise UsageError(
            f"{target} is the directory this command runs in, or above it, and cannot be replaced as a whole. Choose a "
            "separate directory."
        )
    if target.is_dir():
        if not any(target.iterdir()) or any(any(target.glob(mark)) for mark in marks):
            return
    elif not target.exists():
        return
    raise UsageError(
        f"{target} exists and is not a {kind}. Writing there would delete its content: choose another directory, "
        "or remove it yourself."
    )


@contextlib.contextmanager
def atomic_directory(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside ``destination`` that replaces it when the block succeeds.

    Every file is flushed before the rename. On Linux an existing destination is swapped in one step, so that at
    every moment a complete directory has the name. If anything fails, the temporary directory is removed and the
    old one stays.
    """
    target = Path(destination)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield work
        for entry in sorted(work.rglob("*")):
            if entry.is_file():
                fd = os.open(entry, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        os.chmod(work, 0o755)  # noqa: S103 (mkdtemp gave 0700; a bundle is there to be read)
        if target.exists():
            _swap(work, target)
        else:
            os.rename(work, target)
        fsync_directory(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Exchange two directories; afterwards ``target`` is the new one and ``new`` the old one."""
    exchange, at_cwd = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux's renameat2(2)
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 and renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(target), exchange) == 0:
        return
    aside = new.with_name(new.name + ".old")
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, new)
