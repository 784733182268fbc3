"""The user's cache directory, for files that only save time on this machine and can be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory", "private_directory"]


def cache_directory(name: str) -> Path:
    """Return ``$XDG_CACHE_HOME/sbs-edge/<name>`` (``~/.cache`` where the variable is not set).

    Raises:
        RuntimeError: there is no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "sbs-edge" / name


def private_directory(folder: Path) -> bool:
    """Create ``folder`` for this user only (mode 0700); return whether nobody else can write there.

    Raises:
        OSError: it cannot be created.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    owned = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return owned and not status.st_mode & 0o022
