"""Models and their versions, and where a model's bundles are found on disk.

The directory of a model is either a bundle or a folder of bundles, one for each version.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.serve.admission import Gate
from sbs_edge.serve.batching import Batcher
from sbs_edge.serve.engine import Engine, ExplanationLike, ModelCard, PredictionLike

__all__ = ["MANIFEST", "NAME", "LabelWork", "Model", "ModelVersion", "RationaleWork", "parse_source"]

MANIFEST = "manifest.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

LabelWork = tuple[str, list[int], list[str] | None]  # text, tokens, choices
RationaleWork = tuple[str, list[int], int | None]  # text, tokens, maximum of new tokens


def parse_source(argument: str) -> tuple[str | None, Path]:
    """Split ``name=path`` or ``path``; a name is letters, digits, dots, dashes and underscores."""
    name, separator, path = argument.partition("=")
    if not separator:
        return None, Path(argument)
    if not NAME.fullmatch(name):
        raise UsageError(f"The model name {name!r} is not valid; use letters, digits, '.', '_' and '-'.")
    return name, Path(path)


@functools.lru_cache(maxsize=1024)  # called for each request, rejected ones included
def _natural(version: str) -> tuple[Any, ...]:
    """Return a key that sorts versions by number: 2 before 10, 1.9 before 1.10."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.findall(r"\d+|\D+", version))


@dataclass(eq=False)
class ModelVersion:
    """A loaded bundle with its two queues; ``leases`` counts the requests that hold it."""

    card: ModelCard
    engine: Engine
    fingerprint: str
    labels: Batcher[LabelWork, PredictionLike | Exception]
    rationales: Batcher[RationaleWork, ExplanationLike | Exception]
    label_gate: Gate
    rationale_gate: Gate
    source: Path | None = None
    leases: int = 0
    retired: bool = False
    unsound: str = ""  # why its answers are invalid, found while it answered

    def release(self) -> None:
        """End a request's lease; the last lease of a retired version closes it."""
        self.leases -= 1
        if self.retired and self.leases == 0:
            self.close()

    def retire(self) -> None:
        """Accept no new requests, and close once the running ones are done."""
        self.retired = True
        if self.leases == 0:
            self.close()

    def close(self) -> None:
        """Stop the queues and free the engine."""
        self.labels.close()
        self.rationales.close()
        self.engine.close()


class Model:
    """A model: its name, its directory, its versions in service, and those refused."""

    def __init__(self, name: str | None, source: Path) -> None:
        self.name = name  # as given, or else the name of the first version loaded
        self.source = source
        self.versions: dict[str, ModelVersion] = {}
        self.refused: dict[str, str] = {}  # path of a version -> fingerprint that failed
        self.problems: dict[str, str] = {}  # path of a version -> why its files are not served

    @property
    def newest(self) -> ModelVersion | None:
        """Return the version that answers requests without a version."""
        if len(self.versions) == 1:
            return next(iter(self.versions.values()))
        return self.versions[max(self.versions, key=_natural)] if self.versions else None

    def loaded_from(self, path: Path) -> ModelVersion | None:
        """Return the version that was loaded from ``path``, whatever the files there are now."""
        return next((loaded for loaded in self.versions.values() if loaded.source == path), None)

    def in_service(self, version: str | None, fingerprint: str) -> ModelVersion | None:
        """Return the version that was loaded from exactly these files, if there is one."""
        for loaded in self.versions.values():
            same = loaded.fingerprint == fingerprint and not loaded.unsound
            if same and version in (None, loaded.card.version):
                return loaded
        return None

    def candidates(self, limit: int) -> list[tuple[str | None, Path]]:
        """Return (version or ``None`` to take the manifest's, bundle), newest first."""
        if (self.source / MANIFEST).is_file():
            return [(None, self.source)]
        try:
            found = [p for p in self.source.iterdir() if not p.name.startswith(".")]
        except OSError as error:
            raise IntegrityError(
                f"The model directory {self.source} cannot be read: {error.strerror}."
            ) from error
        # The directory of a loaded version counts even without a manifest: it is being overwritten.
        bundles = [
            p
            for p in found
            if NAME.fullmatch(p.name)
            and ((p / MANIFEST).is_file() or (p.is_dir() and self.loaded_from(p) is not None))
        ]
        bundles.sort(key=lambda p: _natural(p.name), reverse=True)
        # A few more than are kept, so that a bad new version does not hide a good older one.
        return [(p.name, p) for p in bundles[: limit + 4]]
