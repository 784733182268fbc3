"""Check that a directory is exactly what its manifest says, before the bundle is used."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sbs_edge.errors import IntegrityError
from sbs_edge.runtime.external_data import external_locations
from sbs_edge.runtime.manifest import DIGEST, MANIFEST, file_digest, safe_member, safe_name

__all__ = ["check_external_data", "verify_files"]

_HASH_THREADS = 4  # hashing releases the GIL, so files are read in parallel


def verify_files(root: Path, files: Mapping[str, Mapping[str, Any]], unchanged: Collection[str] = ()) -> None:
    """Check that the directory holds exactly the listed files, with the listed sizes and digests.

    Args:
        root: the bundle's directory.
        files: name -> ``bytes`` and ``sha256``.
        unchanged: names that passed this check before and have not changed; they are not read again.

    Raises:
        IntegrityError: a file is missing, extra, changed, a link or special, or a graph takes its
            constants from a file that the manifest does not list.
    """
    paths = {name: safe_member(root, name) for name in files}
    for name, path in paths.items():
        size = path.stat().st_size
        if size != files[name]["bytes"]:
            raise IntegrityError(
                f"{path} has {size} bytes; the manifest says {files[name]['bytes']}. Copy the bundle again."
            )
    _reject_unlisted_files(root, files)
    reading = {name: path for name, path in paths.items() if name not in unchanged}
    if not reading:
        return
    from concurrent.futures import ThreadPoolExecutor  # imported late, because it takes milliseconds

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = list(pool.map(_digest, reading.values()))
    for (name, path), digest in zip(reading.items(), digests, strict=True):
        if digest != files[name]["sha256"]:
            raise IntegrityError(f"{path} does not have the digest in the manifest. Copy the bundle again.")
    for name in reading:
        if name.endswith(".onnx"):
            check_external_data(root, name, files)


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise IntegrityError(f"The bundle file {path} cannot be read: {error.strerror}.") from error


def _reject_unlisted_files(root: Path, files: Mapping[str, Any]) -> None:
    def unreadable(error: OSError) -> None:
        raise IntegrityError(
            f"The bundle directory {error.filename} cannot be read: {error.strerror}."
        ) from error

    for folder, subfolders, names in os.walk(root, followlinks=False, onerror=unreadable):
        for name in [*subfolders, *names]:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink():
                raise IntegrityError(
                    f"The bundle {root} contains the link {relative!r}; links are not allowed."
                )
            if name in names and relative not in files and relative not in (MANIFEST, DIGEST):
                raise IntegrityError(
                    f"The bundle {root} contains {relative!r}, which its manifest does not list. Remove it."
                )


def check_external_data(root: Path, name: str, files: Mapping[str, Any]) -> None:
    """Check that the graph ``name`` takes its constants only from listed files beside it.

    Raises:
        IntegrityError: a location leaves the graph's directory or is not in the manifest.
    """
    for location in external_locations((root / name).read_bytes(), str(root / name)):
        beside = str(PurePosixPath(name).parent / location) if safe_name(location) else ""
        if beside not in files:
            raise IntegrityError(
                f"The graph {root / name} takes constants from {location!r}, which is not a file of this "
                "bundle. Do not use this bundle; export it again from the student."
            )
