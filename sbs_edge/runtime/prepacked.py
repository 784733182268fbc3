"""Weights in the order this machine's kernels read them, kept once a machine and mapped into memory.

onnxruntime rearranges ("pre-packs") constant weights when it loads a graph, into memory of each process.
Saved once, a private copy of the rearranged file is mapped instead: loading is quicker.
The file depends on the processor and on onnxruntime's version, so it lives in the user's cache directory,
never in a bundle, and may be deleted at any time.

The directory belongs to the user alone (mode 0700), as a compiler's cache does; an entry that is
incomplete or that the runtime refuses is made again.
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

from sbs_edge.runtime import cache as user_cache
from sbs_edge.runtime.manifest import file_digest
from sbs_edge.runtime.ort import onnxruntime_module
from sbs_edge.runtime.private import private_copy

__all__ = ["MIN_BYTES", "cache_directory", "load_prepacked", "prepacked_key"]

MIN_BYTES = 4 << 20  # below, packing takes a few milliseconds and no page is worth sharing
KEEP = 32  # entries; the least recently used are removed

_GRAPH, _WEIGHTS, _LIST = "model.onnx", "weights.bin", "files.json"


def cache_directory() -> Path:
    """Return where the entries lie: ``$XDG_CACHE_HOME/sbs-edge/prepacked``."""
    return user_cache.cache_directory("prepacked")


def _say(level: str, message: str, *values: object) -> None:
    import logging  # here, as shutil below: a start that uses an entry needs neither

    getattr(logging.getLogger("sbs_edge.runtime"), level)(message, *values)


@cache
def _processor() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = [line for line in first.splitlines() if line.startswith(("model", "flags", "Features", "CPU "))]
    return f"{platform.machine()}\n" + "\n".join(kept)


def prepacked_key(digests: Sequence[str]) -> str:
    """Return the name of the entry for a graph whose files have these SHA-256 digests."""
    onnxruntime = onnxruntime_module()

    parts = ["1", onnxruntime.__version__, _processor(), *digests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def _listed(entry: Path) -> dict[str, dict[str, Any]] | None:
    """Return what an entry holds, file name -> ``bytes`` and ``sha256``; None: it is not complete."""
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
) -> Any | None:
    """Return a session over the pre-packed form of ``graph``, or None where there can be none.

    Args:
        graph: the bundle's graph.
        digests: SHA-256 of the graph and of the files of its constants.
        options: makes fresh session options.
        create: makes a session from a path and options; may raise.
        make: makes a session of ``graph`` itself from options; may raise.

    The first call on a machine makes the entry while loading; a full disk or a directory that cannot be
    written costs the saving only.
    """
    onnxruntime = onnxruntime_module()

    try:
        root = cache_directory()
        if not user_cache.private_directory(root):
            _say("warning", "%s is writable by others; pre-packed weights are not used.", root)
            return None
        entry = root / prepacked_key(digests)
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
    if entry.exists():
        _remove(entry)
    return _make(entry, graph, options, make)


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
    _forget_old(entry.parent)
    return session


def _remove(entry: Path) -> None:
    import shutil

    shutil.rmtree(entry, ignore_errors=True)


def _forget_old(root: Path) -> None:
    with contextlib.suppress(OSError):
        entries = sorted(
            (path for path in root.iterdir() if not path.name.startswith(".")),
            key=lambda path: path.stat().st_mtime,
        )
        for path in entries[:-KEEP]:
            _remove(path)
