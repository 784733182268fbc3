"""The interface between server and runtime: a loaded bundle, its description, and its loader.

:class:`sbs_edge.runtime.student.Student` implements :class:`Engine`; the rest of the server uses nothing else of it.
"""

# ruff: noqa: D102 (the members are documented where they are implemented)

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Engine", "ExplanationLike", "Loader", "ModelCard", "PredictionLike", "card_of", "student_loader"]


class PredictionLike(Protocol):
    """The answer to a text; see :class:`sbs_edge.runtime.student.Prediction`."""

    @property
    def label(self) -> str: ...
    @property
    def probability(self) -> float: ...
    @property
    def probabilities(self) -> Mapping[str, float]: ...
    @property
    def abstained(self) -> bool: ...
    @property
    def truncated(self) -> bool: ...


class ExplanationLike(Protocol):
    """A rationale; see :class:`sbs_edge.runtime.student.Explanation`."""

    @property
    def rationale(self) -> str: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def truncated(self) -> bool: ...
    @property
    def complete(self) -> bool: ...


class Engine(Protocol):
    """A loaded, thread-safe model."""

    @property
    def manifest(self) -> Mapping[str, Any]: ...
    @property
    def target(self) -> str: ...

    def predict(
        self,
        texts: Sequence[str],
        labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Sequence[PredictionLike]: ...

    def explain(
        self,
        texts: Sequence[str],
        max_new_tokens: int | None = None,
        *,
        truncate: bool | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Sequence[ExplanationLike]: ...

    def tokenize(self, texts: Sequence[str], task: str = "label") -> list[list[int]]: ...

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


Loader = Callable[[Path], Engine]


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Properties of a bundle that the server needs, read once from its manifest."""

    name: str
    version: str
    label_kind: str
    labels: tuple[str, ...]
    max_source_tokens: int
    max_new_tokens: int
    target: str
    abstain_below: float
    explains: bool = True  # whether the target has a graph that generates


def card_of(engine: Engine) -> ModelCard:
    """Return the description of the bundle that ``engine`` has loaded."""
    manifest = engine.manifest
    limits, labels = manifest["limits"], manifest["labels"]
    return ModelCard(
        name=str(manifest["name"]),
        version=str(manifest["version"]),
        label_kind=str(labels["kind"]),
        labels=tuple(labels.get("labels") or ()),
        max_source_tokens=int(limits["max_source_tokens"]),
        max_new_tokens=int(limits["max_new_tokens"]),
        target=str(engine.target),
        explains=any(role in manifest["targets"][engine.target] for role in ("explainer", "decoder_step")),
        abstain_below=float((manifest.get("calibration") or {}).get("abstain_below") or 0.0),
    )


def student_loader(target: str | None, threads: int | None, max_batch_tokens: int) -> Loader:
    """Return a function that loads a bundle; every digest is checked before a graph is opened."""

    def load(path: Path) -> Engine:
        from sbs_edge.runtime.student import Student

        return Student.load(
            path, target=target, threads=threads, recheck=True, max_batch_tokens=max_batch_tokens, long=False
        )

    return load
