"""Remember which files of a bundle passed the digest check, so that unchanged files are not read again.

Reading and hashing a bundle takes longer than opening it. After a complete check the device, inode, size,
modification time and change time of every file are stored in the user's cache directory. A file with the same
five values counts as unchanged, as in version control. A program that writes to a file cannot keep its change
time, but a failing disk can: use a complete check there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sbs_edge.runtime.cache import cache_directory, private_directory

__all__ = ["VerifiedFiles", "state_of"]

KEEP = 256  # number of bundles; the least recently checked are removed
# A file changed again within one tick of the clock would look the same; younger files are not remembered.
SETTLED_NS = 2_000_000_000


class VerifiedFiles:
    """The record of the checked files of a bundle directory."""

    def __init__(self, root: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
        """Look the bundle up.

        Args:
            root: the bundle's directory.
            listed: the manifest's ``files``; other digests mean another bundle.
        """
        key = json.dumps([os.path.realpath(root), listed], sort_keys=True)
        self._name = hashlib.sha256(key.encode()).hexdigest()[:40] + ".json"
        self._root = root
        self._before = {name: _signature(root / name) for name in listed}
        self._entry = self._find()
        known = self._read() if self._entry else {}
        self.unchanged = {name for name, found in self._before.items() if found == known.get(name)}
        """Names of the files that need no reading."""

    def still(self, name: str) -> bool:
        """Return whether a file has the state that it had when this object was created."""
        return _signature(self._root / name) == self._before[name]

    def _find(self) -> Path | None:
        try:
            folder = cache_directory("checked")
            return folder / self._name if private_directory(folder) else None
        except (OSError, RuntimeError):  # RuntimeError: no home directory
            return None

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._entry.read_text(encoding="utf-8")) if self._entry else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def settled(self) -> dict[str, list[int]]:
        """Return the state, before the check, of files old enough that any later change shows."""
        now = time.time_ns()
        return {n: found for n, found in self._before.items() if found and found[-1] + SETTLED_NS < now}

    def remember(self) -> None:
        """Store the state that the files had before the check that just succeeded."""
        settled = self.settled()
        if self._entry is None or not settled or settled.keys() == self.unchanged:
            return
        from sbs_edge import files

        try:
            files.write_text(self._entry, json.dumps(settled))
            entries = sorted(self._entry.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in entries[:-KEEP]:
                old.unlink(missing_ok=True)
        except OSError:  # without space, the next start just checks again
            return


def _signature(path: Path) -> list[int]:
    try:
        return state_of(os.lstat(path))
    except (OSError, ValueError):  # missing, or not a usable name: the check that follows reports it
        return []


def state_of(found: os.stat_result) -> list[int]:
    """Return device, inode, size, modification time and change time (ns): equal only for the same content."""
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
