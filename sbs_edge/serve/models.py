"""The models being served: loading, verifying, warming, swapping and retiring their versions.

A model comes from one directory: either a bundle, or a folder of bundles, one for each version. A
new version is loaded, verified and warmed on a thread beside the one in use; only then do new
requests go to it, while requests that hold the old one finish there. A version that fails stays
out, the reason is logged, and what served before goes on serving.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sbs_edge.errors import IntegrityError, SbsEdgeError, UsageError
from sbs_edge.serve import errors
from sbs_edge.serve.admission import Gate
from sbs_edge.serve.batching import Batcher
from sbs_edge.serve.engine import Engine, ExplanationLike, Loader, ModelCard, PredictionLike, card_of
from sbs_edge.serve.logs import logger
from sbs_edge.serve.metrics import Metrics
from sbs_edge.serve.process_settings import lower_thread_priority
from sbs_edge.serve.settings import ServeSettings

__all__ = ["Model", "ModelVersion", "Registry", "parse_source"]

MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

LabelWork = tuple[str, list[int], list[str] | None]  # text, tokens, answers for tasks with choices
RationaleWork = tuple[str, list[int], int | None]  # text, tokens, longest rationale in tokens


def parse_source(argument: str) -> tuple[str | None, Path]:
    """Split ``name=path`` or ``path``; a name is letters, digits, dots, dashes and underscores."""
    name, separator, path = argument.partition("=")
    if not separator:
        return None, Path(argument)
    if not _NAME.fullmatch(name):
        raise UsageError(f"The model name {name!r} is not usable; use letters, digits, '.', '_' and '-'.")
    return name, Path(path)


def _nothing() -> None:
    """Do nothing."""


@functools.lru_cache(maxsize=1024)  # asked for each request, refused ones too
def _natural(version: str) -> tuple[Any, ...]:
    """Order versions as people count: 2 before 10, 1.9 before 1.10."""
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.findall(r"\d+|\D+", version))


def _fingerprint(bundle: Path) -> str:
    """Digest of the manifest and of every file's size, times and inode: changes whenever a file does."""
    digest = hashlib.sha256((bundle / MANIFEST).read_bytes())
    for root, folders, names in os.walk(bundle):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            info = path.lstat()
            state = f"{info.st_size}\0{info.st_mtime_ns}\0{info.st_ctime_ns}\0{info.st_ino}"
            digest.update(f"{path.relative_to(bundle)}\0{state}\n".encode())
    return digest.hexdigest()


def _reason(model: Model, version: str | None, *, kept: bool) -> str:
    """Say what is wrong without a path: health probes need no token."""
    name = f"{model.name or 'a model'}, version {version}" if version else model.name or "a model"
    rest = "the one loaded before still answers" if kept else "it is not served"
    return f"The files of {name} were refused, and {rest}. The log has the reason (version_refused)."


def _isolated(run: Any, batch: list[Any]) -> list[Any]:
    """Run a batch; if it fails, run its items one by one, so that one bad text fails alone."""
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


@dataclass(eq=False)
class ModelVersion:
    """One loaded bundle with its two lanes; ``leases`` counts the requests that hold it."""

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
    unsound: str = ""  # why its answers are not to be trusted; it was found out while answering

    def release(self) -> None:
        """End one request's hold; the last one out of a retired version closes it."""
        self.leases -= 1
        if self.retired and self.leases == 0:
            self.close()

    def retire(self) -> None:
        """Take no new requests; close once the running ones are done."""
        self.retired = True
        if self.leases == 0:
            self.close()

    def close(self) -> None:
        """Stop the lanes and free the engine."""
        self.labels.close()
        self.rationales.close()
        self.engine.close()


class Model:
    """One name: its directory, its versions, and what was refused."""

    def __init__(self, name: str | None, source: Path) -> None:
        self.name = name  # from the command line, or else from the first version loaded
        self.source = source
        self.versions: dict[str, ModelVersion] = {}
        self.refused: dict[str, str] = {}  # path of a version -> fingerprint that failed
        self.problems: dict[str, str] = {}  # path of a version -> why what lies there is not served

    @property
    def newest(self) -> ModelVersion | None:
        """The version that answers requests without one."""
        if len(self.versions) == 1:
            return next(iter(self.versions.values()))
        return self.versions[max(self.versions, key=_natural)] if self.versions else None

    def loaded_from(self, path: Path) -> ModelVersion | None:
        """Return the loaded version that was read from ``path``, whatever lies there now."""
        return next((loaded for loaded in self.versions.values() if loaded.source == path), None)

    def in_service(self, version: str | None, fingerprint: str) -> ModelVersion | None:
        """Return the loaded version made from these very files, if there is one."""
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
        # A loaded version's directory counts without a manifest too: it is being written again.
        bundles = [
            p
            for p in found
            if _NAME.fullmatch(p.name)
            and ((p / MANIFEST).is_file() or (p.is_dir() and self.loaded_from(p) is not None))
        ]
        bundles.sort(key=lambda p: _natural(p.name), reverse=True)
        # A few more than are kept, so that a bad newest version does not hide an older good one.
        return [(p.name, p) for p in bundles[: limit + 4]]


class Registry:
    """All models by name."""

    def __init__(
        self,
        sources: Sequence[tuple[str | None, Path]],
        settings: ServeSettings,
        metrics: Metrics,
        loader: Loader,
    ) -> None:
        if not sources:
            raise UsageError("There is nothing to serve: give at least one bundle.")
        self._models = [Model(name, path) for name, path in sources]
        self._settings = settings
        self._metrics = metrics
        self._loader = loader
        # The threads of a graph are started by the one that loads it, and stand back like it.
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="load", initializer=lower_thread_priority, initargs=(settings.worker_nice,)
        )
        self.on_change: Callable[[], None] = _nothing  # called when versions came or went
        self._refreshing = asyncio.Lock()
        self.by_name: dict[str, Model] = {}

    @property
    def ready(self) -> bool:
        """Every model has a version that passed its warm-up, and none has answered nonsense since."""
        return all(
            model.versions and not any(version.unsound for version in model.versions.values())
            for model in self._models
        )

    @property
    def problems(self) -> list[str]:
        """What an operator should know of the versions: what is wrong with one that answers, or with its files."""
        found = []
        for model in self._models:
            found += [v.unsound for v in model.versions.values() if v.unsound]
            found += model.problems.values()
        return found

    @property
    def only(self) -> ModelVersion | None:
        """The version every request without a name and version goes to, if one model is served."""
        return self._models[0].newest if len(self._models) == 1 else None

    def find(self, name: str | None, version: str | None = None) -> ModelVersion:
        """Return a version in service, or raise 404 (unknown) or 503 (nothing ready)."""
        if name is None:
            if len(self._models) != 1:
                raise errors.bad_request(
                    f"Several models are served; name one of: {', '.join(self.by_name)}."
                )
            model = self._models[0]
        elif name in self.by_name:
            model = self.by_name[name]
        else:
            if not self.ready:
                raise errors.not_ready()
            served = ", ".join(sorted(self.by_name))
            raise errors.HttpError(404, f"There is no model of that name here; there are: {served}.")
        chosen = model.newest if version is None else model.versions.get(version)
        if chosen is None:
            if not model.versions:
                raise errors.not_ready()
            raise errors.HttpError(404, "There is no such version of this model here.")
        return chosen

    async def refresh(self, *, first: bool = False, retry_refused: bool = False) -> None:
        """Bring every model up to date with its directory.

        At the start (``first``) a model without a single good version raises the reason; later, a
        failure leaves in service what was there.
        """
        async with self._refreshing:
            before = self._in_service()
            for model in self._models:
                if retry_refused:
                    model.refused.clear()
                failure = await self._refresh_model(model)
                if first and not model.versions:
                    raise failure or IntegrityError(
                        f"{model.source} holds no bundle: there is no {MANIFEST}."
                    )
            if self._in_service() != before:
                self.on_change()

    def _in_service(self) -> list[int]:
        return [id(version) for model in self._models for version in model.versions.values()]

    async def _refresh_model(self, model: Model) -> Exception | None:
        loop = asyncio.get_running_loop()
        failure: Exception | None = None
        wanted: list[ModelVersion] = []
        problems: dict[str, str] = {}
        try:
            candidates = await loop.run_in_executor(self._pool, model.candidates, self._settings.max_versions)
        except SbsEdgeError as error:
            logger.error("model_unreadable", source=str(model.source), error=str(error))
            return error
        for version, path in candidates:
            if len(wanted) >= self._settings.max_versions:
                break
            mark = ""
            try:
                mark = await loop.run_in_executor(self._pool, _fingerprint, path)
                known = model.in_service(version, mark)
                if known is None:
                    if model.refused.get(str(path)) == mark:
                        self._keep(model, version, path, wanted, problems)
                        continue
                    known = await self._load(model, version, path, mark)
                wanted.append(known)
                model.refused.pop(str(path), None)
            except Exception as error:  # whatever a bad bundle raises, it stays out and the rest serves
                failure = error
                kept = self._keep(model, version, path, wanted, problems)
                if mark and model.refused.get(str(path)) == mark:
                    continue
                model.refused[str(path)] = mark
                self._metrics.reloads.labels(model.name or "", "refused").inc()
                logger.error("version_refused", bundle=str(path), error=str(error), kept=kept)
        model.problems = problems
        self._metrics.stale_versions.labels(model.name or "").set(
            sum(model.loaded_from(Path(path)) is not None for path in problems)
        )
        if wanted:
            self._swap(model, wanted)
        return failure

    @staticmethod
    def _keep(
        model: Model, version: str | None, path: Path, wanted: list[ModelVersion], problems: dict[str, str]
    ) -> bool:
        """Note why ``path`` is refused, and keep what was loaded from it before, if anything was."""
        kept = model.loaded_from(path)
        problems[str(path)] = _reason(model, version, kept=kept is not None)
        if kept is not None:
            wanted.append(kept)
        return kept is not None

    async def _load(self, model: Model, version: str | None, path: Path, mark: str) -> ModelVersion:
        """Load, verify and warm one bundle on the loading thread."""

        def work() -> tuple[Engine, ModelCard]:
            engine = self._loader(path)
            try:
                engine.warm_up()
                card = card_of(engine)
                if mark != _fingerprint(path):
                    raise IntegrityError(f"The bundle {path} changed while it was being loaded.")
            except BaseException:
                engine.close()
                raise
            return engine, card

        engine, card = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        name = model.name or card.name
        try:
            if not _NAME.fullmatch(name):
                raise UsageError(f"The name {name!r} in {path} is not usable; serve it as NAME={path}.")
            if self.by_name.get(name, model) is not model:
                raise UsageError(f"Two bundles are called {name!r}; serve one of them as OTHER_NAME={path}.")
        except UsageError:
            engine.close()
            raise
        card = replace(card, name=name, version=version or card.version)
        settings = self._settings
        wait_s = settings.max_queue_ms / 1000

        def watch(task: str) -> Any:
            size = self._metrics.batch_size.labels(name, task)
            seconds = self._metrics.inference_seconds.labels(name, task)
            queue = self._metrics.queue_seconds.labels(name, task)

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

        lane_options: dict[str, Any] = {
            "max_batch_tokens": settings.max_batch_tokens,
            "max_wait_s": settings.max_wait_ms / 1000,
            "nice": settings.worker_nice,
        }
        return ModelVersion(
            card=card,
            engine=engine,
            fingerprint=mark,
            source=path,
            labels=Batcher(
                lambda batch: _isolated(label_batch, batch),
                workers=settings.label_workers,
                ahead=settings.label_workers,
                name="labels",
                on_batch=watch("label"),
                **lane_options,
            ),
            rationales=Batcher(
                lambda batch: _isolated(rationale_batch, batch),
                workers=settings.rationale_workers,
                name="rationales",
                on_batch=watch("rationale"),
                **lane_options,
            ),
            label_gate=Gate(settings.max_queue_texts, "label_queue", wait_s),
            rationale_gate=Gate(settings.max_queue_texts, "rationale_queue", wait_s),
        )

    def _swap(self, model: Model, wanted: list[ModelVersion]) -> None:
        """Put ``wanted`` in service in one step and retire the rest."""
        before = list(model.versions.values())
        model.versions = {v.card.version: v for v in reversed(wanted)}
        model.name = wanted[0].card.name
        self.by_name[model.name] = model
        for version in wanted:
            if version not in before:
                card = version.card
                self._metrics.reloads.labels(card.name, "loaded").inc()
                self._metrics.model_info.labels(card.name, card.version, card.target).set(1)
                logger.info("version_ready", model=card.name, version=card.version, target=card.target)
        kept = {(v.card.name, v.card.version, v.card.target) for v in wanted}
        for version in before:
            if version not in wanted:
                card = version.card
                if (card.name, card.version, card.target) not in kept:
                    self._metrics.forget_version(card.name, card.version, card.target)
                self._metrics.reloads.labels(card.name, "retired").inc()
                logger.info("version_retired", model=card.name, version=card.version)
                version.retire()

    def distrust(self, version: ModelVersion, error: Exception) -> None:
        """Turn readiness off: ``version`` computed something that is not an answer; loading it again may cure it."""
        if not version.unsound:
            version.unsound = (
                f"The model {version.card.name}, version {version.card.version}, gave an answer that is not finite "
                "(NaN or infinity). Send SIGHUP to load it again, or replace the bundle."
            )
            logger.error(
                "version_unsound", model=version.card.name, version=version.card.version, error=str(error)
            )

    def queue_sizes(self) -> dict[tuple[str, str], int]:
        """Return texts waiting for a worker by (model, task)."""
        sizes: dict[tuple[str, str], int] = {}
        for name, model in self.by_name.items():
            sizes[name, "label"] = sum(v.labels.queued for v in model.versions.values())
            sizes[name, "rationale"] = sum(v.rationales.queued for v in model.versions.values())
        return sizes

    def close(self) -> None:
        """Retire everything."""
        for model in self._models:
            for version in model.versions.values():
                version.retire()
        self._pool.shutdown(wait=False, cancel_futures=True)
