"""A small engine with the runtime's interface, whose answers can be computed by hand.

It exists for what a real bundle cannot do on command: be slow, fail, be watched. Every test of
answers over the network uses a real bundle (``test_serve_bundle.py``).
"""

from __future__ import annotations

import io
import json
import logging
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.serve import logs


@dataclass
class Predicted:
    label: str
    probability: float
    probabilities: dict[str, float]
    abstained: bool = False
    truncated: bool = False
    n_input_tokens: int = 0


@dataclass
class Explained:
    rationale: str
    n_tokens: int
    truncated: bool = False
    complete: bool = True


@dataclass
class HandEngine:
    """Tokens are words; the label is the checksum of the text modulo the number of labels."""

    version: str = "1"
    kind: str = "closed"
    labels: tuple[str, ...] = ("call", "schedule", "wait")
    label_s: float = 0.0
    rationale_s: float = 0.0
    poison: str | None = None
    target: str = "by-hand"
    batches: list[list[str]] = field(default_factory=list)
    closed: bool = False
    concurrent: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def manifest(self) -> dict:
        return {
            "name": "hand",
            "version": self.version,
            "limits": {"max_source_tokens": 40, "max_new_tokens": 16},
            "labels": {"kind": self.kind, "labels": list(self.labels) if self.kind == "closed" else []},
            "calibration": {"abstain_below": 0.0},
        }

    def _words(self, text: str) -> list[str]:
        return text.split()[:40]

    def answer(self, text: str, labels=None) -> Predicted:
        labels = list(labels or self.labels)
        words = self._words(text)
        at = zlib.crc32(" ".join(words).encode()) % len(labels)
        rest = 0.3 / (len(labels) - 1)
        odds = {label: 0.7 if i == at else rest for i, label in enumerate(labels)}
        return Predicted(labels[at], 0.7, odds, truncated=len(text.split()) > 40, n_input_tokens=len(words))

    def predict(self, texts, labels=None, *, truncate=None):
        assert not self.closed
        self.batches.append(list(texts))
        if self.poison and any(self.poison in text for text in texts):
            raise UsageError("This text is poison.")
        if self.label_s:
            time.sleep(self.label_s)
        return [self.answer(t, labels[i] if labels else None) for i, t in enumerate(texts)]

    def explain(self, texts, max_new_tokens=None, *, truncate=None):
        assert not self.closed
        if self.rationale_s:
            time.sleep(self.rationale_s)
        return [Explained("because " + t[::-1], 1 + len(t.split())) for t in texts]

    def count_tokens(self, texts, task="label"):
        return [len(t.split()) + 1 for t in texts]

    def warm_up(self) -> None:
        self.predict(["warm"])
        self.batches.clear()

    def close(self) -> None:
        self.closed = True


def write_hand_bundle(path: Path, version: str = "1", **options) -> Path:
    """Write a directory that :func:`hand_loader` understands."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").write_text(json.dumps({"version": version, **options}))
    return path


def hand_loader(path: Path) -> HandEngine:
    """Load it; a manifest that says "broken" is refused like a damaged bundle."""
    options = json.loads((path / "manifest.json").read_text())
    if options.pop("broken", False):
        raise IntegrityError(f"The bundle {path} does not match its manifest.")
    return HandEngine(**options)


@pytest.fixture
def json_logs() -> Iterator[io.StringIO]:
    """Configure the server's logs into a string, and put the test run's logging back afterwards."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = list(root.handlers), root.level
    logs.configure("info", stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def hand() -> SimpleNamespace:
    return SimpleNamespace(Engine=HandEngine, load=hand_loader, write=write_hand_bundle)


@pytest.fixture
def hand_bundle(tmp_path: Path) -> Path:
    return write_hand_bundle(tmp_path / "hand")
