"""Memory of this process, bytes on disk, and the size of what must be installed."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["closure", "directory_bytes", "installed_bytes", "memory_mb"]


def memory_mb(pid: int | str = "self") -> dict[str, float]:
    """Return peak resident (VmHWM), resident (VmRSS) and anonymous (RssAnon) memory in MB (1e6 bytes).

    File-backed pages are shared between workers and reclaimed under memory pressure; anonymous ones are not.
    """
    wanted = {"VmHWM": "peak_rss_mb", "VmRSS": "rss_mb", "RssAnon": "anonymous_rss_mb"}
    found: dict[str, float] = {}
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as handle:
        for line in handle:
            key, _, rest = line.partition(":")
            if key in wanted:
                found[wanted[key]] = int(rest.split()[0]) * 1024 / 1e6
    return found


def directory_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a directory (each inode once)."""
    if path.is_file():
        return path.stat().st_size
    seen: dict[tuple[int, int], int] = {}
    for entry in path.rglob("*"):
        if entry.is_file():
            stat = entry.stat()
            seen[(stat.st_dev, stat.st_ino)] = stat.st_size
    return sum(seen.values())


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def closure(roots: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the installed distributions that ``roots`` need, themselves included.

    Args:
        roots: distribution name to the extras asked for.

    Markers are evaluated here; extras follow PEP 508 (``optimum[onnxruntime]``). A requirement that
    is not installed is left out.
    """
    # Imported here and below, because a worker measures its memory with this module and must not load these.
    from importlib import metadata

    from packaging.requirements import Requirement

    todo = [(_normal(name), frozenset(extras)) for name, extras in roots.items()]
    done: set[tuple[str, frozenset[str]]] = set()
    names: set[str] = set()
    while todo:
        item = todo.pop()
        if item in done:
            continue
        done.add(item)
        name, extras = item
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        names.add(name)
        for line in distribution.requires or []:
            requirement = Requirement(line)
            contexts: list[dict[str, str]] = [{"extra": extra} for extra in ("", *sorted(extras))]
            marker = requirement.marker
            if marker is None or any(marker.evaluate(context) for context in contexts):
                todo.append((_normal(requirement.name), frozenset(requirement.extras)))
    return sorted(names)


def installed_bytes(names: list[str]) -> dict[str, int]:
    """Return the bytes on disk of each distribution's files; compiled ``.pyc`` files are not counted.

    An editable install lists only its pointer: the package's own folder is counted for it.
    """
    from importlib import metadata

    sizes: dict[str, int] = {}
    for name in names:
        distribution = metadata.distribution(name)
        total = 0
        for entry in distribution.files or []:
            if entry.suffix == ".pyc":
                continue
            path = Path(str(distribution.locate_file(entry)))
            if path.is_file():
                total += path.stat().st_size
        if name == "sbs-edge" and total < 100_000:
            import sbs_edge

            root = Path(os.path.realpath(sbs_edge.__file__)).parent
            total = sum(p.stat().st_size for p in root.rglob("*.py"))
            for link in ("kernels", "export", "bench"):
                total += sum(p.stat().st_size for p in (root / link).glob("**/*.py"))
        sizes[name] = total
    return sizes
