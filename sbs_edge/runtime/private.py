"""Private copies of the files that a runtime maps into memory, so that nobody else can change them.

A mapped file is not a copy: bytes that are written to it later appear in the process, and truncating it
ends the process (SIGBUS). So only private copies are mapped. A copy is made in a directory of
this user (mode 0700), and its digest is computed there. Its name is removed as soon as the runtime has mapped it:
the pages stay, but no program can open them.

The processes of a server with several workers share a copy: the first one makes it in the directory
that :func:`share_copies` names, and the process that started them removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sbs_edge.errors import IntegrityError
from sbs_edge.runtime.cache import cache_directory, private_directory
from sbs_edge.runtime.manifest import file_digest
from sbs_edge.runtime.verified_files import VerifiedFiles

__all__ = ["forget_shared", "private_copy", "share_copies"]

_PREFIX = "copy-"
_ABANDONED_S = 3600.0  # a copy exists while it is mapped, for a second; older ones are of processes that died

_shared: Path | None = None


def share_copies(folder: Path | None) -> None:
    """Share copies with other processes of this user that use the same ``folder``; None: do not share."""
    global _shared
    _shared = folder


@contextlib.contextmanager
def private_copy(root: Path, listed: Mapping[str, Mapping[str, Any]], *, recheck: bool) -> Iterator[Path]:
    """Yield a directory with private copies of files, which is removed at the end of the block.

    Args:
        root: the directory of the originals.
        listed: path below ``root`` -> ``bytes`` and ``sha256``.
        recheck: hash every copy and do not use the user's cache directory. Otherwise copies of files that are
            unchanged since this user's last check are not hashed again (see
            :mod:`sbs_edge.runtime.verified_files`).

    Raises:
        IntegrityError: a file does not have its digest.
        OSError: a file cannot be read, or there is no place for a copy.
    """
    if _shared is not None:
        with _shared_copy(_shared, root, listed) as copied:
            yield copied
        return
    work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=None if recheck else _place()))
    try:
        _copy(root, listed, work, recheck=recheck)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _place() -> Path | None:
    """Return the directory for copies: the user's cache directory, or None for the system's temporary one."""
    try:
        place = cache_directory("private")
        if not private_directory(place) or not os.access(place, os.W_OK):
            return None
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    oldest = time.time() - _ABANDONED_S
    for entry in place.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError):
            if entry.lstat().st_mtime < oldest:
                shutil.rmtree(entry, ignore_errors=True)
    return place


def _copy(root: Path, listed: Mapping[str, Mapping[str, Any]], work: Path, *, recheck: bool) -> None:
    checked = None if recheck else VerifiedFiles(root, listed)
    for name, entry in listed.items():
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copyfile(root / name, target, follow_symlinks=False)
        known = checked is not None and name in checked.unchanged and checked.still(name)
        if target.is_symlink() or not (known or file_digest(target) == entry["sha256"]):
            raise IntegrityError(f"{root / name} does not have the digest it is listed with.")
    if checked is not None:
        checked.remember()


@contextlib.contextmanager
def _shared_copy(folder: Path, root: Path, listed: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """Yield the shared copy of these files in ``folder``; the first process makes it.

    The lock is held while the copy is used, so that :func:`forget_shared` leaves it alone.
    """
    import fcntl

    key = json.dumps({name: entry["sha256"] for name, entry in listed.items()}, sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:40]
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).is_dir():
            work = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
            try:
                _copy(root, listed, work, recheck=True)
                work.rename(folder / name)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
        yield folder / name


def forget_shared(folder: Path) -> None:
    """Remove the names of shared copies that no process is opening now; what is mapped stays."""
    import fcntl

    for path in folder.glob("*.lock"):
        copied = path.with_suffix("")
        if copied.is_dir():
            with path.open("w") as lock, contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(copied, ignore_errors=True)
