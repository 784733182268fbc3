"""The bundle's table of contents: typed access to ``manifest.json`` and the paths it may name."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sbs_edge.errors import IntegrityError

__all__ = ["DIGEST", "FORMAT", "MANIFEST", "file_digest", "read_manifest", "safe_member", "verify_files"]

FORMAT = 1
MANIFEST = "manifest.json"
DIGEST = "manifest.json.sha256"
MAX_MANIFEST_BYTES = 64 << 20
_REQUIRED = ("format", "task", "prefixes", "limits", "labels", "targets", "default_target", "model", "files")


def file_digest(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def safe_member(root: Path, name: str) -> Path:
    """Return the path of the bundle member ``name``, refusing every name that could leave ``root``.

    Raises:
        IntegrityError: the name is absolute, has ``..``, a backslash, a drive or a control character,
            or the file is a link, a device or anything else that is no plain file.
    """
    pure = PurePosixPath(name)
    bad = (
        not name
        or pure.is_absolute()
        or name != str(pure)
        or any(part in ("..", ".") for part in pure.parts)
        or any(character in "\\:" or ord(character) < 32 or ord(character) == 127 for character in name)
    )
    if bad:
        raise IntegrityError(
            f"The bundle {root} names the file {name!r}, which is not a plain path inside it. "
            "Do not use this bundle; export it again from the student."
        )
    path = root
    for part in pure.parts:
        path = path / part
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError as error:
            raise IntegrityError(
                f"The bundle {root} lacks {name!r}, which its manifest lists. Copy the whole directory again."
            ) from error
        except (OSError, ValueError) as error:
            raise IntegrityError(f"The bundle member {name!r} of {root} cannot be read: {error}.") from error
        if not (stat.S_ISDIR(mode) if part != pure.parts[-1] or path != root / name else stat.S_ISREG(mode)):
            raise IntegrityError(
                f"The bundle {root} holds {name!r} as a link or special file; only plain files are allowed."
            )
    return path


def read_manifest(root: Path) -> dict[str, Any]:
    """Read and check ``manifest.json`` against its digest file.

    Raises:
        IntegrityError: the manifest is absent, damaged or of a later format.
    """
    if not root.is_dir():
        raise IntegrityError(
            f"{root} is no bundle: there is no such directory. Make one with sbs-edge export."
        )
    if not (root / MANIFEST).exists():
        raise IntegrityError(f"{root} is no bundle: it has no {MANIFEST}. Make one with sbs-edge export.")
    path, digest = safe_member(root, MANIFEST), safe_member(root, DIGEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes: not a manifest.")
    content = path.read_bytes()
    if digest.read_bytes() != hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise IntegrityError(
            f"{path} does not have the digest in {DIGEST}: one of them was changed. Copy the bundle again."
        )
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(manifest, dict) or any(key not in manifest for key in _REQUIRED):
        missing = [key for key in _REQUIRED if not isinstance(manifest, dict) or key not in manifest]
        raise IntegrityError(f"{path} lacks the field(s) {', '.join(missing)}; export the bundle again.")
    if not isinstance(manifest["format"], int) or manifest["format"] > FORMAT:
        raise IntegrityError(
            f"{path} has bundle format {manifest['format']}, and this version reads up to {FORMAT}. "
            "Upgrade sbs-edge."
        )
    return manifest


def verify_files(root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the directory holds exactly the listed files with the listed digests.

    Raises:
        IntegrityError: a file is missing, extra, changed, or names clash on systems that fold case.
    """
    folded: dict[str, str] = {}
    for name, entry in files.items():
        if folded.setdefault(name.casefold(), name) != name:
            raise IntegrityError(f"The bundle {root} lists {name!r} twice, in different case.")
        path = safe_member(root, name)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise IntegrityError(
                f"{path} has {size} bytes where the manifest says {entry['bytes']}. Copy the bundle again."
            )
        if file_digest(path) != entry["sha256"]:
            raise IntegrityError(f"{path} does not have the digest in the manifest. Copy the bundle again.")
    for folder, subfolders, names in os.walk(root, followlinks=False):
        for name in [*subfolders, *names]:
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if path.is_symlink():
                raise IntegrityError(f"The bundle {root} holds the link {relative!r}; links are not allowed.")
            if name in names and relative not in files and relative not in (MANIFEST, DIGEST):
                raise IntegrityError(
                    f"The bundle {root} holds {relative!r}, which its manifest does not list. Remove it."
                )
