"""A bundle on disk: its digests are checked before it is read, and it is written in one step."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sbs_edge import files
from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.runtime.external_data import external_locations
from sbs_edge.runtime.integrity import verify_files
from sbs_edge.runtime.manifest import DIGEST, MANIFEST, file_digest, read_manifest, safe_member
from sbs_edge.runtime.prepacked import MIN_BYTES
from sbs_edge.runtime.private import private_copy
from sbs_edge.runtime.verified_files import VerifiedFiles, state_of

__all__ = ["Bundle", "seal"]


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle.

    Attributes:
        root: its directory.
        manifest: the checked manifest.
        known: state of the files whose digest need not be computed again while it stays the same (empty: compute
            every digest whenever a file is read; None: the bundle was opened without checking digests).
    """

    root: Path
    manifest: Mapping[str, Any]
    known: Mapping[str, Sequence[int]] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True, recheck: bool = True) -> Bundle:
        """Open the bundle at ``path``.

        Args:
            path: the directory.
            verify: check the digest of every file; without it only names and presence are checked.
            recheck: read every file; without it, those that are unchanged since this user's last complete
                check on this machine are not read again (see :mod:`sbs_edge.runtime.verified_files`).

        Raises:
            IntegrityError: the directory is not what its manifest says.
        """
        root = Path(path)
        manifest = read_manifest(root)
        listed = manifest["files"]
        if verify and (recheck or sum(entry["bytes"] for entry in listed.values()) < MIN_BYTES):
            verify_files(root, listed)
        elif verify:
            checked = VerifiedFiles(root, listed)
            verify_files(root, listed, checked.unchanged)
            checked.remember()
            return cls(root, manifest, checked.settled())
        return cls(root, manifest, {} if verify else None)

    def read(self, name: str) -> bytes:
        """Return the content of a listed file, checked against its digest, in this process's own memory.

        Raises:
            IntegrityError: the file is absent, or not what the manifest says: it was changed after the bundle
                was opened.
        """
        path, entry = self.member(name), self.manifest["files"][name]
        try:
            with open(path, "rb", opener=_no_link) as handle:
                before = state_of(os.fstat(handle.fileno()))
                content = handle.read(entry["bytes"] + 1 if self.known is not None else -1)
                after = state_of(os.fstat(handle.fileno()))
        except OSError as error:
            raise IntegrityError(f"The bundle file {path} cannot be read: {error.strerror}.") from error
        if self.known is None or before == after == self.known.get(name):
            return content
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise IntegrityError(
                f"{path} was changed after the bundle was opened: it does not have the digest in the manifest. "
                "Copy the bundle again, and load it again."
            )
        return content

    def read_graph(self, name: str) -> tuple[bytes, dict[str, bytes]]:
        """Return the content of a graph, and of the files of its constants under the names that it uses."""
        content = self.read(name)
        places = external_locations(content, str(self.root / name))
        beside = {place: str(PurePosixPath(name).parent / place) for place in sorted(places)}
        return content, {place: self.read(member) for place, member in beside.items()}

    @contextlib.contextmanager
    def private_copy(self, graph: str) -> Iterator[Path]:
        """Yield the path of a private copy of ``graph`` and its files, removed after the block."""
        folder = graph.rpartition("/")[0]
        every = self.manifest["files"]
        listed = {name: entry for name, entry in every.items() if name.rpartition("/")[0] == folder}
        for name in listed:
            self.member(name)
        with private_copy(self.root, listed, recheck=not self.known) as copied:
            yield copied / graph

    def member(self, name: str) -> Path:
        """Return the path of a listed file."""
        if name not in self.manifest["files"]:
            raise IntegrityError(f"The bundle {self.root} uses {name!r}, which its manifest does not list.")
        return safe_member(self.root, name)

    def weight_digests(self, graph: str, *, small: bool = False) -> list[str] | None:
        """Return the digests of ``graph`` and its files; None if they are too small to pre-pack and not ``small``."""
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
                f"Choose one of them, or export the student for {chosen!r} too."
            )
        return chosen, targets[chosen]


def seal(root: Path, manifest: dict[str, Any]) -> None:
    """List every file under ``root`` with size and digest, and write the manifest and its digest."""
    manifest["files"] = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, DIGEST)
    }
    content = (files.to_json(manifest, indent=2) + "\n").encode()
    (root / MANIFEST).write_bytes(content)
    (root / DIGEST).write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n")
