"""Real bundles, a server in its own process, and an engine whose answers can be computed by hand.

The engine has the runtime's interface, and does what a real bundle cannot do on command: be slow, fail, be watched.
Every test of answers over the network uses a real bundle (``test_bundle.py``).
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import structlog

from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.serve import logs
from sbs_edge.serve.app import create_app
from sbs_edge.serve.server import create_service
from sbs_edge.serve.settings import ServeSettings


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
            "targets": {self.target: {"explainer": "explainer.onnx"}},
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

    def predict(self, texts, labels=None, *, truncate=None, tokens=None):
        assert not self.closed
        self.batches.append(list(texts))
        if self.poison and any(self.poison in text for text in texts):
            raise UsageError("This text is poison.")
        if self.label_s:
            time.sleep(self.label_s)
        return [self.answer(t, labels[i] if labels else None) for i, t in enumerate(texts)]

    def explain(self, texts, max_new_tokens=None, *, truncate=None, tokens=None):
        assert not self.closed
        if self.rationale_s:
            time.sleep(self.rationale_s)
        return [Explained("because " + t[::-1], 1 + len(t.split())) for t in texts]

    def tokenize(self, texts, task="label"):
        return [[len(word) for word in t.split()] + [1] for t in texts]

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
def anyio_backend() -> str:
    """Run async tests on asyncio, as the server does."""
    return "asyncio"


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


class Running:
    """An application with its lifespan, and a client that calls it in this event loop."""

    new_engine = HandEngine

    def __init__(self, path, engine=None, escalation=None, **options):
        self.engine = engine or HandEngine()
        self.service = create_service([(None, path)], ServeSettings(**options), lambda _: self.engine)
        if escalation:
            self.service.escalation = escalation
        self.asgi = create_app(self.service)

    async def __aenter__(self):
        self._life = self.asgi.router.lifespan_context(self.asgi)
        await self._life.__aenter__()
        await self.asgi.state.loading
        transport = httpx.ASGITransport(self.asgi)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://edge")
        return self

    async def __aexit__(self, *error):
        await self.client.aclose()
        await self._life.__aexit__(*error)

    async def predict(self, texts, headers=None, **body):
        return await self.client.post("/v1/predict", json={"texts": texts, **body}, headers=headers)

    def rejected(self, reason):
        return (
            self.service.metrics.registry.get_sample_value("sbs_edge_rejected_total", {"reason": reason})
            or 0.0
        )


@pytest.fixture
def running() -> type[Running]:
    return Running


@pytest.fixture
def hand() -> SimpleNamespace:
    return SimpleNamespace(Engine=HandEngine, load=hand_loader, write=write_hand_bundle)


@pytest.fixture
def hand_bundle(tmp_path: Path) -> Path:
    return write_hand_bundle(tmp_path / "hand")


def _student(folder: Path, kind: str) -> Path:
    """Write an untrained T5 of 80k parameters as a student directory; serving does not mind."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.data.jsonl import write_examples
    from sbs_edge.data.tokenizer import build_tokenizer
    from sbs_edge.training.student_dir import StudentDir

    folder.mkdir()
    splits = builtin_splits("ci")
    prefixes = {"label": "[label] ", "rationale": "[rationale] "}
    texts = [text for e in splits.train for text in (e.input, e.label, e.rationale) if text]
    tokenizer = build_tokenizer(texts, list(prefixes.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=(tokenizer.get_vocab_size() + 7) // 8 * 8, d_model=64, d_kv=16, d_ff=128, num_layers=2,
        num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    task = splits.task if kind == "closed" else replace(splits.task, label_kind=kind, labels=())

    def rows(examples):
        if kind == "closed":
            return examples
        return [replace(e, choices=tuple(splits.task.labels)) for e in examples]

    card = {
        "format": 1, "task": StudentDir.task_card(task), "prefixes": prefixes, "mode": "stepwise",
        "rationale_weight": 1.0, "max_source_tokens": 128, "max_target_tokens": 32, "max_label_tokens": 4,
        "seed": 0, "versions": {}, "training": {},
    }  # fmt: skip
    (folder / "sbs_edge.json").write_text(json.dumps(card))
    write_examples(folder / "validation.jsonl", rows(splits.validation[:48]))
    write_examples(folder / "calibration.jsonl", rows(splits.train[:64]))
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory) -> dict[str, Path]:
    """Real bundles: one of a closed label set, one whose requests bring their choices."""
    pytest.importorskip("torch")
    from sbs_edge.export.api import export

    root = tmp_path_factory.mktemp("bundles")
    for kind in ("closed", "choices"):
        export(_student(root / f"student-{kind}", kind), root / kind, targets=("cpu-int8",), max_drop=100)
    return {kind: root / kind for kind in ("closed", "choices")}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Inputs of the built-in task, of different length."""
    from sbs_edge.data.builtin import builtin_splits

    rows = [e.input for e in builtin_splits("ci").test[:64]]
    return [text if i % 3 else text.split(" . ")[0] for i, text in enumerate(rows)]


class ServerProcess:
    """``sbs-edge serve`` as a user starts it, its port and its log."""

    def __init__(self, *arguments: object, ready: bool = True, **env: str) -> None:
        handle, name = tempfile.mkstemp(suffix=".log")
        self._log = Path(name)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sbs_edge", "serve", *map(str, arguments), "--port", "0"],
            stderr=handle,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **env},
        )
        os.close(handle)
        self.url = ""
        if ready:
            self.await_event("version_ready", "listening")

    def log(self) -> list[dict]:
        lines = self._log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    def await_event(self, *events: str, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            lines = self.log()
            for line in lines:
                if line["event"] == "listening" and "port" in line:
                    scheme = "https" if line["tls"] else "http"
                    self.url = f"{scheme}://127.0.0.1:{line['port']}"
            if set(events) <= {line["event"] for line in lines}:
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(
            f"the server did not say {events}; exit {self.process.poll()}: {self.log()[-5:]}"
        )

    def stop(self, timeout_s: float = 20) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._log.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def server_class() -> type[ServerProcess]:
    return ServerProcess


@pytest.fixture
def serve_process():
    """Start servers; every one is stopped at the end of the test."""
    started: list[ServerProcess] = []

    def start(*arguments: object, **options: Any) -> ServerProcess:
        started.append(ServerProcess(*arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def server(bundles) -> Iterator[ServerProcess]:
    """One server with both bundles, shared by the tests that change nothing."""
    process = ServerProcess(f"desk={bundles['closed']}", f"choose={bundles['choices']}", ready=False)
    try:
        process.await_event("ready")
        yield process
    finally:
        process.stop()


@pytest.fixture
def open_raw():
    """Open raw connections; a read waits at most 20 s, so that a server that never closes fails the test."""
    opened = []

    def make(server):
        host, port = server.url.removeprefix("http://").split(":")
        opened.append(socket.create_connection((host, int(port)), timeout=20))
        return opened[-1]

    yield make
    for each in opened:
        each.close()
