"""A lock on an output directory, which names its holder and ends with the holder's process. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from sbs_edge.errors import UsageError

fcntl: Any
try:
    fcntl = import_module("fcntl")
except ImportError:  # not on Windows, where nothing prevents two writers
    fcntl = None

__all__ = ["held"]


@contextlib.contextmanager
def held(place: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Lock the directory ``place`` until the block ends, so that no other process writes to it.

    It is a system lock on ``.NAME.lock`` beside the directory, so it is released even if the process is killed.

    Args:
        place: the directory; it need not exist.
        doing: a noun for the work, such as "training", for the message that the next process gets.

    Raises:
        UsageError: another process holds it.
    """
    target = Path(place).absolute()
    path = target.with_name(f".{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = _locked(path, target, doing)
    try:
        os.ftruncate(fd, 0)
        os.write(fd, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(fd)


def _locked(path: Path, target: Path, doing: str) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is None:
            return fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(fd, 200).decode("utf-8", "replace") or "another process"
            os.close(fd)
            raise UsageError(
                f"A {doing} of {holder} is already writing to {target}. Wait until it ends, or choose another directory."
            ) from error
        # The previous holder may have removed the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return fd
        os.close(fd)
