"""The bundle's table of contents: ``manifest.json``, its shape, and the paths it may name."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sbs_edge.errors import IntegrityError, SbsEdgeError, UsageError
from sbs_edge.windows import LongSettings

__all__ = [
    "DIGEST",
    "FORMAT",
    "LONG_ROLES",
    "MANIFEST",
    "ROLES",
    "file_digest",
    "no_bundle",
    "read_manifest",
    "safe_member",
    "safe_name",
]

FORMAT = 1
MANIFEST = "manifest.json"
DIGEST = "manifest.json.sha256"
MAX_MANIFEST_BYTES = 64 << 20
LONG_ROLES = ("long_encoder", "long_label_scorer", "long_choice_scorer", "long_explainer")
ROLES = (
    "label_scorer", "choice_scorer", "explainer", "encoder", "decoder_step", "single_file", *LONG_ROLES,
)  # fmt: skip
"""Entries of a target that name a file."""

_LIMITS = ("max_source_tokens", "max_new_tokens", "max_label_tokens")
_TOKEN_IDS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


def file_digest(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def safe_name(name: object) -> bool:
    """Return whether ``name`` is a plain relative path, without ``..``, drive, backslash or control character."""
    if not isinstance(name, str) or not name or name != str(PurePosixPath(name)):
        return False
    pure = PurePosixPath(name)
    return (
        bool(pure.parts)  # "." has none
        and not pure.is_absolute()
        and not any(part in ("..", ".") for part in pure.parts)
        and not any(character in "\\:" or ord(character) < 32 or ord(character) == 127 for character in name)
    )


def safe_member(root: Path, name: str) -> Path:
    """Return the path of the bundle member ``name``, refusing every name that could leave ``root``.

    Raises:
        IntegrityError: the name is not a plain relative path, the file is absent, or it is a symbolic
            link, a hard link, a device or anything else that is not a file of this directory alone.
    """
    if not safe_name(name):
        raise IntegrityError(
            f"The bundle {root} names the file {name!r}, which is not a plain path inside it. "
            "Do not use this bundle; export it again from the student."
        )
    parts = PurePosixPath(name).parts
    try:
        path, status = root, os.stat(root)
    except OSError as error:
        raise IntegrityError(
            f"The bundle directory {root} cannot be read: {error.strerror}. If it was moved, load the bundle "
            "from its new place."
        ) from error
    for depth, part in enumerate(parts, start=1):
        path = path / part
        try:
            status = os.lstat(path)
        except FileNotFoundError as error:
            raise IntegrityError(
                f"The bundle {root} lacks {name!r}, which its manifest lists. Copy the whole directory again."
            ) from error
        except (OSError, ValueError) as error:
            raise IntegrityError(f"The bundle member {name!r} of {root} cannot be read: {error}.") from error
        if not (stat.S_ISREG(status.st_mode) if depth == len(parts) else stat.S_ISDIR(status.st_mode)):
            raise IntegrityError(
                f"The bundle {root} contains {name!r} as a link or special file; only plain files are allowed. "
                "Copy the bundle with its links resolved (cp -rL)."
            )
    if status.st_nlink > 1:
        # The file could be changed through its other name after its digest was checked.
        raise IntegrityError(
            f"The bundle {root} contains {name!r} as a hard link: the file has {status.st_nlink} names, and a change "
            "through another one would not be noticed. Copy the bundle (cp -r) and use the copy."
        )
    return path


def no_bundle(root: Path) -> SbsEdgeError:
    """Return the error for a directory without a manifest, with a hint if it is a student."""
    if (root / "config.json").is_file():
        return UsageError(
            f"{root} is a student or another checkpoint, not a bundle. Export it first, and use the result: "
            f"sbs-edge export {root} --out {root.with_name(root.name + '.bundle')}"
        )
    return IntegrityError(f"{root} is not a bundle: it has no {MANIFEST}. Create one with sbs-edge export.")


def read_manifest(root: Path) -> dict[str, Any]:
    """Read ``manifest.json``, check it against its digest file and check its shape.

    Raises:
        UsageError: there is no such directory.
        IntegrityError: the manifest is missing, damaged, of a later format, or lacks fields.
    """
    if not root.is_dir():
        what = "it is a file" if root.is_file() else "there is no such directory"
        raise UsageError(
            f"{root} is not a bundle: {what}. Check the path, or create one with sbs-edge export."
        )
    if not os.path.lexists(root / MANIFEST):
        raise no_bundle(root)
    path, digest = safe_member(root, MANIFEST), safe_member(root, DIGEST)
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes, so it is not a manifest.")
    content = path.read_bytes()
    wanted = hashlib.sha256(content).hexdigest().encode() + b"\n"
    if digest.stat().st_size != len(wanted) or digest.read_bytes() != wanted:
        raise IntegrityError(
            f"{path} does not have the digest in {DIGEST}: one of them was changed. Copy the bundle again."
        )
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path} is not valid JSON: {error}.") from error
    problem = _format_problem(manifest) or _shape_problem(manifest)
    if problem:
        raise IntegrityError(f"{path} {problem}")
    return dict(manifest)


def _format_problem(manifest: Any) -> str | None:
    if not isinstance(manifest, dict) or not _whole(manifest.get("format")):
        return "has no bundle format; export the bundle again."
    if manifest["format"] > FORMAT:
        return f"has bundle format {manifest['format']}, and this version reads up to {FORMAT}. Upgrade sbs-edge."
    return None


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _mapping(value: object, keys: tuple[str, ...], good: Any) -> bool:
    return isinstance(value, dict) and all(key in value and good(value[key]) for key in keys)


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _long_settings(section: object) -> bool:
    """Return whether ``section`` is the description of a :class:`LongSettings`."""
    types = {
        "chunk": int, "max_tokens": int, "overlap": (int, float), "header": str, "marker": bool,
        "top_k": (int, type(None)), "trained": str,
    }  # fmt: skip
    if not isinstance(section, dict) or set(section) != set(types):
        return False
    if not all(isinstance(section[name], kind) for name, kind in types.items()):  # type: ignore[arg-type]
        return False
    try:
        return LongSettings.of(section) is not None
    except UsageError:
        return False


def _shape_problem(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with the fields the runtime uses, or None."""
    labels, targets, files = manifest.get("labels"), manifest.get("targets"), manifest.get("files")
    listed = files if isinstance(files, dict) else {}
    calibration = manifest.get("calibration") or {}
    checks = {
        "task": isinstance(manifest.get("task"), dict),
        "prefixes": _mapping(manifest.get("prefixes"), ("label", "rationale"), lambda v: isinstance(v, str)),
        "limits": _mapping(manifest.get("limits"), _LIMITS, _whole),
        "model": _mapping(manifest.get("model"), _TOKEN_IDS, _whole),
        "labels": isinstance(labels, dict)
        and _strings(labels.get("labels"))
        and labels.get("method") in ("first-token", "trie", "decode", "choices"),
        "calibration": isinstance(calibration, dict)
        and _number(calibration.get("temperature"))
        and _number(calibration.get("abstain_below")),
        "targets": isinstance(targets, dict)
        and bool(targets)
        and all(
            isinstance(entry, dict)
            and _strings(entry.get("providers"))
            and (
                "max_batch_rows" not in entry
                or (_whole(entry["max_batch_rows"]) and entry["max_batch_rows"] > 0)
            )
            and all(isinstance(entry[role], str) and entry[role] in listed for role in ROLES if role in entry)
            for entry in targets.values()
        ),
        "default_target": isinstance(targets, dict)
        and isinstance(manifest.get("default_target"), str)
        and manifest["default_target"] in targets,
        "files": isinstance(files, dict)
        and "tokenizer.json" in files
        and all(
            isinstance(entry, dict) and _whole(entry.get("bytes")) and isinstance(entry.get("sha256"), str)
            for entry in files.values()
        ),
    }
    if manifest.get("long") is not None:
        checks["long"] = _long_settings(manifest["long"])
    wrong = [name for name, fine in checks.items() if not fine]
    if wrong:
        return f"lacks the field(s) {', '.join(wrong)} or has them in a wrong shape; export the bundle again."
    return _clash(listed)


def _clash(files: Mapping[str, Any]) -> str | None:
    """Return the complaint about two names that are the same on systems that ignore case or accents, or None."""
    seen: dict[str, str] = {}
    for name in files:
        for path in (PurePosixPath(name), *PurePosixPath(name).parents):
            key = _folded(str(path))
            if seen.setdefault(key, str(path)) != str(path):
                return f"lists {str(path)!r} twice, in different case; do not use this bundle."
    return None


def _folded(path: str) -> str:
    if path.isascii():
        return path.lower()
    import unicodedata  # imported here: its tables take a third of a megabyte, and our own names are plain ASCII

    return unicodedata.normalize("NFC", path).casefold()
