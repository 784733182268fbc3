"""The models in service: find one for a request, and keep them up to date with their directories.

A new version is loaded, verified and warmed up on a thread beside the version in use. Only then do new requests go
to it; requests that hold the old version finish there. A version that fails is not served, the reason is logged, and
the version before it stays in service.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from sbs_edge.errors import SbsEdgeError, UsageError
from sbs_edge.runtime.manifest import no_bundle
from sbs_edge.serve import errors
from sbs_edge.serve.engine import Loader
from sbs_edge.serve.loading import fingerprint_of, load_engine, new_version
from sbs_edge.serve.logs import logger
from sbs_edge.serve.metrics import Metrics
from sbs_edge.serve.models import NAME, Model, ModelVersion
from sbs_edge.serve.process_settings import lower_thread_priority
from sbs_edge.serve.settings import ServeSettings

__all__ = ["Registry"]


def _nothing() -> None:
    """Do nothing."""


def _reason(model: Model, version: str | None, *, kept: bool) -> str:
    """Return the problem without a path, because health probes need no token."""
    name = f"{model.name or 'a model'}, version {version}" if version else model.name or "a model"
    rest = "the one loaded before still answers" if kept else "it is not served"
    return f"The files of {name} were refused, and {rest}. The log has the reason (version_refused)."


class Registry:
    """All models, by name."""

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
        # A graph's threads are started by the thread that loads it, and inherit its priority.
        self._pool = ThreadPoolExecutor(
            1, thread_name_prefix="load", initializer=lower_thread_priority, initargs=(settings.worker_nice,)
        )
        self.on_change: Callable[[], None] = _nothing  # called when the versions in service have changed
        self._refreshing = asyncio.Lock()
        self.by_name: dict[str, Model] = {}

    @property
    def ready(self) -> bool:
        """Return whether every model has a version that passed its warm-up, without an invalid answer since."""
        return all(
            model.versions and not any(version.unsound for version in model.versions.values())
            for model in self._models
        )

    @property
    def problems(self) -> list[str]:
        """Return the problems of versions in service and of refused files, for operators."""
        found = []
        for model in self._models:
            found += [v.unsound for v in model.versions.values() if v.unsound]
            found += model.problems.values()
        return found

    @property
    def only(self) -> ModelVersion | None:
        """Return the version that answers every request without a name and version, if only one model is served."""
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

        At the start (``first``) a model without a valid version raises the reason. Later, the versions in service
        stay if the new files fail.
        """
        async with self._refreshing:
            before = self._in_service()
            for model in self._models:
                if retry_refused:
                    model.refused.clear()
                failure = await self._refresh_model(model)
                if first and not model.versions:
                    raise failure or no_bundle(model.source)
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
            fingerprint = ""
            try:
                fingerprint = await loop.run_in_executor(self._pool, fingerprint_of, path)
                known = model.in_service(version, fingerprint)
                if known is None:
                    if model.refused.get(str(path)) == fingerprint:
                        self._keep(model, version, path, wanted, problems)
                        continue
                    known = await self._load(model, version, path, fingerprint)
                wanted.append(known)
                model.refused.pop(str(path), None)
            except Exception as error:  # whatever error a bad bundle raises, the others are served
                failure = error
                kept = self._keep(model, version, path, wanted, problems)
                if fingerprint and model.refused.get(str(path)) == fingerprint:
                    continue
                model.refused[str(path)] = fingerprint
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
        """Record why ``path`` is refused, and keep the version loaded from it before, if there is one."""
        kept = model.loaded_from(path)
        problems[str(path)] = _reason(model, version, kept=kept is not None)
        if kept is not None:
            wanted.append(kept)
        return kept is not None

    async def _load(self, model: Model, version: str | None, path: Path, fingerprint: str) -> ModelVersion:
        """Load, verify and warm up a bundle on the loading thread."""
        engine, card = await asyncio.get_running_loop().run_in_executor(
            self._pool, load_engine, self._loader, path, fingerprint
        )
        name = model.name or card.name
        try:
            if not NAME.fullmatch(name):
                raise UsageError(f"The name {name!r} in {path} is not usable; serve it as NAME={path}.")
            if self.by_name.get(name, model) is not model:
                raise UsageError(f"Two bundles are called {name!r}; serve one of them as OTHERNAME={path}.")
        except UsageError:
            engine.close()
            raise
        card = replace(card, name=name, version=version or card.version)
        return new_version(card, engine, fingerprint, path, self._settings, self._metrics)

    def _swap(self, model: Model, wanted: list[ModelVersion]) -> None:
        """Put ``wanted`` in service in one step, and retire the other versions."""
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
        """Turn readiness off: ``version`` gave an invalid answer, and may have to be loaded again."""
        if not version.unsound:
            version.unsound = (
                f"The model {version.card.name}, version {version.card.version}, gave an answer that is not finite "
                "(NaN or infinity). Send SIGHUP to load it again, or replace the bundle."
            )
            logger.error(
                "version_unsound", model=version.card.name, version=version.card.version, error=str(error)
            )

    def queue_sizes(self) -> dict[tuple[str, str], int]:
        """Return the number of texts waiting for a worker, by (model, task)."""
        sizes: dict[tuple[str, str], int] = {}
        for name, model in self.by_name.items():
            sizes[name, "label"] = sum(v.labels.queued for v in model.versions.values())
            sizes[name, "rationale"] = sum(v.rationales.queued for v in model.versions.values())
        return sizes

    def close(self) -> None:
        """Retire all versions."""
        for model in self._models:
            for version in model.versions.values():
                version.retire()
        self._pool.shutdown(wait=False, cancel_futures=True)
