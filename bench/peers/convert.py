"""Turns a student into what a peer loads, once: the results stay in the user's cache directory.

Each conversion runs in a process of its own (``python -m sbs_edge.bench.peers.convert``), so that a
converter that fails, prints or changes global state takes nothing else down.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from sbs_edge import files
from sbs_edge.bench.peers.system import load_module
from sbs_edge.errors import SbsEdgeError
from sbs_edge.runtime.cache import cache_directory
from sbs_edge.versions import installed_versions

__all__ = ["ConversionFailed", "cache_root", "converted", "digest"]

_STAMP = "conversion.json"
_TIMEOUT_S = 1800
_DIGESTED = ("model.safetensors", "config.json", "tokenizer.json")


class ConversionFailed(SbsEdgeError):
    """A peer could not be made from this student; the message is the row's reason."""


def cache_root() -> Path:
    """Return ``$XDG_CACHE_HOME/sbs-edge/bench`` (``~/.cache/sbs-edge/bench`` where the variable is not set)."""
    return cache_directory("bench")


def digest(folder: Path, names: tuple[str, ...] = _DIGESTED) -> str:
    """sha256 over the named files (those that exist)."""
    total = hashlib.sha256()
    for name in names:
        path = folder / name
        if path.is_file():
            total.update(name.encode())
            with path.open("rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


def converted(system: str, student: Path, weights: str) -> Path:
    """Return the directory of the converted student, converting it when the cache has none.

    Args:
        system: a peer's name.
        student: the student directory.
        weights: :func:`digest` of it.

    Raises:
        ConversionFailed: a package is missing or the converter failed; the last line of its error.
    """
    packages = load_module(system).PACKAGES
    installed = installed_versions(*packages)
    found = {name: installed.get(name, "absent") for name in packages}
    absent = [name for name, version in found.items() if version == "absent"]
    if absent:
        raise ConversionFailed(f"not installed: {', '.join(absent)}")
    key = json.dumps([weights, system, found, {}, 2], sort_keys=True)
    target = cache_root() / f"{system}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (target / _STAMP).is_file():
        return target
    order = {"system": system, "student": str(student), "out": str(target)}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sbs_edge.bench.peers.convert"],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionFailed(f"the conversion took more than {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ConversionFailed(lines[-1][:300] if lines else f"the converter exited with {done.returncode}")
    return target


def _main() -> None:
    order = json.loads(sys.stdin.read())
    started = time.perf_counter()
    with files.atomic_directory(order["out"]) as work:
        facts = load_module(order["system"]).prepare(Path(order["student"]), work)
        facts["seconds"] = round(time.perf_counter() - started, 1)
        files.write_json(work / _STAMP, facts)


if __name__ == "__main__":
    _main()
