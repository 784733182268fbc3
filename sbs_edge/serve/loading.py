"""Load a bundle: verify it, warm it up, and give it its queues."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbs_edge.errors import IntegrityError
from sbs_edge.serve.admission import Gate
from sbs_edge.serve.batching import Batcher
from sbs_edge.serve.engine import Engine, Loader, ModelCard, card_of
from sbs_edge.serve.metrics import Metrics
from sbs_edge.serve.models import MANIFEST, LabelWork, ModelVersion, RationaleWork
from sbs_edge.serve.settings import ServeSettings

__all__ = ["fingerprint_of", "load_engine", "new_version"]


def fingerprint_of(bundle: Path) -> str:
    """Return a digest of the manifest and of every file's size, times and inode; it changes whenever a file does."""
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes())
    for root, folders, names in os.walk(bundle):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            info = path.lstat()
            state = f"{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\0{info.st_ino}"
            digest.update(f"{path.relative_to(bundle)}\0{state}\n".encode())
    return digest.hexdigest()


def load_engine(loader: Loader, path: Path, fingerprint: str) -> tuple[Engine, ModelCard]:
    """Load, verify and warm up the bundle in ``path``.

    Raises:
        IntegrityError: the files do not match the manifest, or changed while they were loaded.
    """
    engine = loader(path)
    try:
        engine.warm_up()
        card = card_of(engine)
        if fingerprint != fingerprint_of(path):
            raise IntegrityError(f"The bundle {path} changed while it was being loaded.")
    except BaseException:
        engine.close()
        raise
    return engine, card


def _isolated(run: Callable[[list[Any]], Any], batch: list[Any]) -> list[Any]:
    """Run a batch; if it fails, run its items one by one, so that only the bad one fails."""
    try:
        return list(run(batch))
    except Exception as error:
        if len(batch) == 1:
            return [error]
    results: list[Any] = []
    for item in batch:
        try:
            results += run([item])
        except Exception as error:
            results.append(error)
    return results


def new_version(
    card: ModelCard,
    engine: Engine,
    fingerprint: str,
    source: Path,
    settings: ServeSettings,
    metrics: Metrics,
) -> ModelVersion:
    """Return a loaded bundle with its queues and their limits."""
    wait_s = settings.max_queue_ms / 1000

    def watch(task: str) -> Any:
        size = metrics.batch_size.labels(card.name, task)
        seconds = metrics.inference_seconds.labels(card.name, task)
        queue = metrics.queue_seconds.labels(card.name, task)

        def on_batch(n_texts: int, elapsed_s: float, waited_s: list[float]) -> None:
            size.observe(n_texts)
            seconds.observe(elapsed_s)
            for each in waited_s:
                queue.observe(each)

        return on_batch

    def label_batch(batch: list[LabelWork]) -> Any:
        texts, tokens = [text for text, _, _ in batch], [ids for _, ids, _ in batch]
        given = [choices for _, _, choices in batch if choices is not None] or None
        return engine.predict(texts, labels=given, truncate=True, tokens=tokens)

    def rationale_batch(batch: list[RationaleWork]) -> Any:
        texts, tokens = [text for text, _, _ in batch], [ids for _, ids, _ in batch]
        return engine.explain(texts, max_new_tokens=batch[0][2], truncate=True, tokens=tokens)

    batcher_options: dict[str, Any] = {
        "max_batch_tokens": settings.max_batch_tokens,
        "max_wait_s": settings.max_wait_ms / 1000,
        "nice": settings.worker_nice,
    }
    return ModelVersion(
        card=card,
        engine=engine,
        fingerprint=fingerprint,
        source=source,
        labels=Batcher(
            lambda batch: _isolated(label_batch, batch),
            workers=settings.label_workers,
            ahead=settings.label_workers,
            name="labels",
            on_batch=watch("label"),
            **batcher_options,
        ),
        rationales=Batcher(
            lambda batch: _isolated(rationale_batch, batch),
            workers=settings.rationale_workers,
            name="rationales",
            on_batch=watch("rationale"),
            **batcher_options,
        ),
        label_gate=Gate(settings.max_queue_texts, "label_queue", wait_s),
        rationale_gate=Gate(settings.max_queue_texts, "rationale_queue", wait_s),
    )
