"""Writing so that a crash leaves either the old file or the new one, never half of either.

Standard library only, because the runtime imports it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["atomic_directory", "fsync_directory", "write_bytes", "write_json", "write_text"]


def fsync_directory(path: Path) -> None:
    """Flush a directory entry, so that a rename inside ``path`` survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace ``path`` by ``content`` in one step: temporary name, flush, rename."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    fsync_directory(target.parent)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """UTF-8 form of :func:`write_bytes`."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as indented JSON with a final newline, in one step."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_directory(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside ``destination`` that replaces it when the block succeeds.

    Every file is flushed before the rename. An existing destination is moved aside first and
    removed only after the new one stands; on any failure the temporary directory is removed and
    the old one stays (or is put back).
    """
    target = Path(destination)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    old = work.with_name(work.name + ".old")
    try:
        yield work
        for entry in sorted(work.rglob("*")):
            if entry.is_file():
                fd = os.open(entry, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        os.chmod(work, 0o755)
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(work, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        fsync_directory(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
