"""Versions of installed packages."""

from __future__ import annotations

from importlib import metadata

__all__ = ["installed_versions"]


def installed_versions(*names: str) -> dict[str, str]:
    """Return name -> version of those of ``names`` that are installed.

    Example:
        >>> installed_versions("no-such-package")
        {}
    """
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
