"""A bundle on disk: opened for reading after every digest was checked, written as one step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.runtime.checked import Checked
from sbs_edge.runtime.integrity import verify_files
from sbs_edge.runtime.manifest import DIGEST, MANIFEST, file_digest, read_manifest, safe_member
from sbs_edge.runtime.prepacked import MIN_BYTES

__all__ = ["Bundle", "seal"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle.

    Attributes:
        root: its directory.
        manifest: the checked manifest.
    """

    root: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, recheck: bool = True) -> Bundle:
        """Open the bundle at ``path``.

        Args:
            path: the directory.
            verify: check the digest of every file; without it only names and presence are checked.
            recheck: read every file; without it, those that are unchanged since this user's last complete
                check on this machine are not read again (see :mod:`sbs_edge.runtime.checked`).

        Raises:
            IntegrityError: the directory is not what its manifest says.
        """
        root = Path(path)
        manifest = read_manifest(root)
        listed = manifest["files"]
        if verify and (recheck or sum(entry["bytes"] for entry in listed.values()) < MIN_BYTES):
            verify_files(root, listed)
        elif verify:
            checked = Checked(root, listed)
            verify_files(root, listed, checked.unchanged)
            checked.remember()
        return cls(root, manifest)

    def member(self, name: str) -> Path:
        """Return the path of a listed file."""
        if name not in self.manifest["files"]:
            raise IntegrityError(f"The bundle {self.root} uses {name!r}, which its manifest does not list.")
        return safe_member(self.root, name)

    def weight_digests(self, graph: str, *, small: bool = False) -> list[str] | None:
        """Return the digests of ``graph`` and of what lies beside it; None: too few to pre-pack, unless ``small``."""
        listed = self.manifest["files"]
        folder = graph.rpartition("/")[0] + "/"
        beside = (
            [n for n in listed if n.startswith(folder) and not n.endswith(".onnx")] if folder != "/" else []
        )
        if not small and sum(listed[name]["bytes"] for name in (graph, *beside)) < MIN_BYTES:
            return None
        return [listed[name]["sha256"] for name in (graph, *sorted(beside))]

    def target(self, name: str | None) -> tuple[str, Mapping[str, Any]]:
        """Return (name, entry) of a target; None: the default one.

        Raises:
            UsageError: the bundle was not exported for it.
        """
        targets = self.manifest["targets"]
        chosen = name or self.manifest["default_target"]
        if chosen not in targets:
            raise UsageError(
                f"The bundle {self.root} has no target {chosen!r}; it has {', '.join(targets)}. "
                f"Export it with --target {chosen}."
            )
        return chosen, targets[chosen]


def seal(root: Path, manifest: dict[str, Any]) -> None:
    """List every file under ``root`` with size and digest, and write the manifest and its digest."""
    manifest["files"] = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, DIGEST)
    }
    content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
    (root / MANIFEST).write_bytes(content)
    (root / DIGEST).write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n")
