"""A cache of pre-packed weights: the order in which this machine's kernels read them, mapped into memory.

onnxruntime rearranges ("pre-packs") constant weights when it loads a graph, in the memory of each process.
Here the rearranged weights are saved once, and a private copy of the file is mapped instead, which loads faster.
The file depends on the processor and on onnxruntime's version. So it is in the user's cache directory,
never in a bundle, and can be deleted at any time.

An entry takes up to four times the space of the graph's weights. All entries together take at most
``SBS_EDGE_PREPACKED_CACHE_MB`` megabytes (2048 unless set; 0 switches the cache off); the least recently used are
removed.

The directory belongs to the user only (mode 0700), like a compiler's cache. An entry that is
incomplete, or that the runtime rejects, is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sbs_edge.errors import UsageError
from sbs_edge.runtime import cache as user_cache
from sbs_edge.runtime.manifest import file_digest
from sbs_edge.runtime.ort import onnxruntime_module
from sbs_edge.runtime.private import private_copy

__all__ = [
    "MAX_MB",
    "MAX_MB_VARIABLE",
    "MIN_BYTES",
    "cache_directory",
    "load_prepacked",
    "max_bytes",
    "prepacked_key",
    "usage",
]

MIN_BYTES = 4 << 20  # for less, packing takes only a few milliseconds
KEEP = 32  # entries; the least recently used are removed
MAX_MB = 2048  # limit of all entries together; the environment variable below overrides it
MAX_MB_VARIABLE = "SBS_EDGE_PREPACKED_CACHE_MB"

_GRAPH, _WEIGHTS, _LIST = "model.onnx", "weights.bin", "files.json"
_TOO_LARGE = "too_large"  # marks an entry that is over the limit by itself; contains its size in bytes


def cache_directory() -> Path:
    """Return the directory of the entries: ``$XDG_CACHE_HOME/sbs-edge/prepacked``."""
    return user_cache.cache_directory("prepacked")


def _say(level: str, message: str, *values: object) -> None:
    import logging  # imported here, like shutil below, because a start that uses an entry needs neither

    getattr(logging.getLogger("sbs_edge.runtime"), level)(message, *values)


@cache
def _processor() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in first.splitlines() if line.startswith(("model", "flags", "Features", "CPU "))]
    return f"{platform.machine()}\n" + "\n".join(kept)


def prepacked_key(digests: Sequence[str], *, corrected: bool = False) -> str:
    """Return the name of the entry for a graph whose files have these SHA-256 digests.

    Args:
        digests: of the graph and of the files of its constants.
        corrected: whether int8 products are made exact (:mod:`sbs_edge.runtime.int8_products`). The option changes
            the form of the weights, so each setting needs its own entry.
    """
    onnxruntime = onnxruntime_module()

    parts = ["2", onnxruntime.__version__, _processor(), f"corrected={corrected}", *digests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _listed(entry: Path) -> dict[str, dict[str, Any]] | None:
    """Return the files of an entry, name -> ``bytes`` and ``sha256``; None if it is incomplete."""
    try:
        found = json.loads((entry / _LIST).read_text(encoding="utf-8"))
        complete = set(found) == {_GRAPH, _WEIGHTS} and all(
            (entry / name).stat().st_size == listed["bytes"] and isinstance(listed["sha256"], str)
            for name, listed in found.items()
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if complete else None


def load_prepacked(
    graph: Path,
    digests: Sequence[str],
    options: Callable[[], Any],
    create: Callable[[Path, Any], Any],
    make: Callable[[Any], Any],
    *,
    corrected: bool = False,
) -> Any | None:
    """Return a session over the pre-packed form of ``graph``, or None if it is not possible.

    Args:
        graph: the bundle's graph.
        digests: SHA-256 of the graph and of the files of its constants.
        options: makes fresh session options.
        create: makes a session from a path and options; may raise.
        make: makes a session of ``graph`` itself from options; may raise.
        corrected: see :func:`prepacked_key`.

    The first call on a machine writes the entry while loading. If the disk is full or the directory cannot be
    written, loading works without the cache.
    """
    onnxruntime = onnxruntime_module()

    try:
        if max_bytes() == 0:
            return None
        root = cache_directory()
        if not user_cache.private_directory(root):
            _say("warning", "%s is writable by others; pre-packed weights are not used.", root)
            return None
        entry = root / prepacked_key(digests, corrected=corrected)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        _say("info", "no pre-packed weights: %s", error)
        return None
    listed = _listed(entry)
    if listed:
        plain = options()
        plain.graph_optimization_level = (
            onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        )  # already optimised
        try:
            with private_copy(entry, listed, recheck=False) as folder:
                session = create(folder / _GRAPH, plain)
        except Exception as error:  # onnxruntime has no common base class for its load errors
            _say("warning", "the pre-packed weights %s are made again: %s", entry, error)
        else:
            with contextlib.suppress(OSError):
                os.utime(entry)
            return session
    if _known_too_large(entry):
        return None
    if entry.exists():
        _remove(entry)
    return _make(entry, graph, options, make)


def _known_too_large(entry: Path) -> bool:
    try:
        return int((entry / _TOO_LARGE).read_text(encoding="ascii")) > max_bytes()
    except (OSError, ValueError):
        return False


def _make(entry: Path, graph: Path, options: Callable[[], Any], make: Callable[[Any], Any]) -> Any | None:
    from sbs_edge import files

    try:
        with files.atomic_directory(entry) as work:
            saving = options()
            saving.optimized_model_filepath = str(work / _GRAPH)
            for key, value in (
                ("session.optimized_model_external_initializers_file_name", _WEIGHTS),
                ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
                ("session.save_external_prepacked_constant_initializers", "1"),
            ):
                saving.add_session_config_entry(key, value)
            session = make(saving)
            listed = {
                name: {"bytes": (work / name).stat().st_size, "sha256": file_digest(work / name)}
                for name in (_GRAPH, _WEIGHTS)
            }
            (work / _LIST).write_text(json.dumps(listed), encoding="utf-8")
    except Exception as error:  # a full disk is reported by onnxruntime in its own way
        _say("info", "no pre-packed weights for %s: %s", graph, error)
        return None
    with contextlib.suppress(OSError):
        _forget_old(entry)
    return session


def _remove(entry: Path) -> None:
    import shutil

    shutil.rmtree(entry, ignore_errors=True)


def max_bytes() -> int:
    """Return the bytes that all entries may take together.

    Raises:
        UsageError: the environment variable is not a whole number of megabytes.
    """
    text = os.environ.get(MAX_MB_VARIABLE, "").strip() or str(MAX_MB)
    if not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"{MAX_MB_VARIABLE} is {text!r}; it must be a whole number of megabytes, where 0 switches the cache off."
        )
    return int(text) << 20


def usage() -> tuple[int, int]:
    """Return how many entries there are and how many bytes they take.

    Raises:
        RuntimeError: there is no home directory.
    """
    entries = _entries(cache_directory())
    return len(entries), sum(size for _, size, _ in entries)


def _entries(root: Path) -> list[tuple[Path, int, float]]:
    """Return (directory, bytes, time of last use) of every entry, the least recently used first."""
    found = []
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                if not path.name.startswith("."):
                    size = sum(file.stat().st_size for file in path.iterdir())
                    found.append((path, size, path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry[2])


def _forget_old(newest: Path) -> None:
    """Remove the least recently used entries until the limits hold; ``newest`` only if it is too large by itself."""
    entries = [entry for entry in _entries(newest.parent) if entry[0] != newest]
    own = sum(file.stat().st_size for file in newest.iterdir())
    most = max_bytes()
    if own > most:
        _say("info", "the pre-packed weights take %d MB, more than %s allows.", own >> 20, MAX_MB_VARIABLE)
        _remove(newest)
        newest.mkdir(mode=0o700)
        (newest / _TOO_LARGE).write_text(str(own), encoding="ascii")
        return
    total, count = own + sum(size for _, size, _ in entries), 1 + len(entries)
    for path, size, _ in entries:
        if total <= most and count <= KEEP:
            break
        _remove(path)
        total, count = total - size, count - 1
