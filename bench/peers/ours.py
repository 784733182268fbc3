"""This project's bundle through its runtime, as ``predict`` and ``serve`` use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbs_edge.bench.peers.system import Choices, Spec, System

__all__ = ["ROOTS", "SYSTEM"]

ROOTS: dict[str, tuple[str, ...]] = {"sbs-edge": ("cpu",)}


class SbsEdge(System):
    """``Student.predict`` and ``Student.explain``."""

    label_variants = ("label",)

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        _, _, self.target = spec.system.partition(":")
        self._budget: int | None = None

    def open(self) -> None:
        """Load the bundle, digests checked, with the pre-packed weights of this machine's cache."""
        self._load(512)

    def _load(self, budget: int) -> None:
        from sbs_edge.runtime.student import Student

        self.student = Student.load(
            Path(self.spec.artifact),
            target=self.target or None,
            threads=self.spec.threads,
            max_batch_tokens=budget,
            **self.spec.options,
        )
        self._budget = budget
        self.precision = self.student.target.removeprefix("cpu-")

    def label(self, texts: Sequence[str], variant: str, choices: Choices = None) -> list[str]:
        """The label; probabilities come with it."""
        del variant
        labels = None if choices is None else [list(row) for row in choices]
        return [found.label for found in self.student.predict(list(texts), labels=labels)]

    def restricted(self, texts: Sequence[str]) -> list[str] | None:
        """The same answers: labels are always chosen among the label set."""
        return self.label(texts, "label") if self.spec.labels else None

    def rationale(self, texts: Sequence[str], steps: int) -> list[tuple[str, int]]:
        """Rationales by the in-graph loop."""
        found = self.student.explain(list(texts), max_new_tokens=steps)
        return [(item.rationale, item.n_tokens) for item in found]

    def settings(self) -> list[dict[str, Any]]:
        """Token budgets of the runtime's own batching."""
        return [{"max_batch_tokens": budget} for budget in (256, 512, 1024)]

    def apply(self, setting: dict[str, Any]) -> None:
        """Reload under another token budget."""
        if self._budget != setting["max_batch_tokens"]:
            self.student.close()
            self._load(int(setting["max_batch_tokens"]))

    def stream(self, texts: Sequence[str], setting: dict[str, Any], choices: Choices = None) -> list[str]:
        """Hand the whole stream over; the runtime sorts and batches."""
        del setting
        return self.label(texts, "label", choices)


SYSTEM = SbsEdge
