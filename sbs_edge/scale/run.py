"""Run a worker class over units with Ray Data; each actor has a student or a teacher client.

Every unit writes a shard, whole or not at all, under a name fixed by the plan. Ray runs a unit
again when its actor dies, and the unit replaces the same shard, so there is exactly one output row per input row. A
run that is started again skips the shards that exist.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from sbs_edge import files
from sbs_edge.errors import DataError, GuardError, IntegrityError, MissingExtra, SbsEdgeError, UsageError
from sbs_edge.resources import usable_cpus
from sbs_edge.scale.units import SHARD_FORMATS, Folder, Unit, plan_units, shard_name, unit_of

__all__ = ["run_units", "session"]

UNIT_RETRIES = 8
"""Number of times that a unit whose actor died runs again, before the run ends with an error."""

FAILURES_IN_A_ROW = 8
"""Number of units that may fail in a row, with none finished between them, before the run ends without the others."""

_ERRORS = {kind.exit_code: kind for kind in (SbsEdgeError, UsageError, GuardError, IntegrityError)}


@contextlib.contextmanager
def session(address: str | None, workers: int, cpus_each: float) -> Iterator[Any]:
    """Connect to a Ray cluster, or start one in this machine for the length of the block."""
    # Under `uv run`, Ray would otherwise send a new environment to every worker.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "scale", "The engine 'ray'") from error
    with contextlib.suppress(ImportError, AttributeError):  # its own place, which may move
        from ray.data._internal import logging as ray_data_logging

        ray_data_logging.configure_logging()  # happens only once; a later call would undo the next line
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    if address is None:
        # One spare CPU for Ray Data's own tasks; CPUs are bookkeeping, not pinning.
        cpus = max(usable_cpus(), int(workers * cpus_each) + 1)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    else:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise UsageError(
                f"No Ray cluster answers at {address}. Check the address, and that both sides have the same "
                "versions of Ray "
                "and Python. If it needs a token, set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH here."
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _plan(out: Folder, pattern: str, settings: dict[str, Any], units: list[Unit]) -> None:
    """Store the plan beside the shards; refuse to mix the shards of two plans."""
    plan = {"format": 1, "input": pattern, "settings": settings, "units": [u.as_dict() for u in units]}
    content = files.to_json(plan, indent=2) + "\n"
    if "_plan.json" not in out.names():
        out.write("_plan.json", content.encode("utf-8", "backslashreplace"))
        return
    old, new = json.loads(out.read("_plan.json")), json.loads(content)
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        raise UsageError(
            f"{out.where} has shards of another run, whose settings differ in: {', '.join(changed)}. Choose "
            "another output "
            "folder, or remove this one to start again."
        )


def _span(done: list[dict[str, Any]]) -> float:
    """Return the seconds from the first unit's start to the last one's end, without the start of Ray and the actors."""
    ends = [figures["ended"] for figures in done]
    return max(ends) - min(f["ended"] - f["seconds"] for f in done) if done else 0.0


def _said(error: BaseException) -> str:
    """Return an exception's text as one line; Ray's are pages long, with the cause at their end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 1000 else f"{text[:300]} ... {text[-700:]}"


def _failure(error: BaseException, *, starting: bool = False) -> dict[str, Any]:
    """Return an exception as plain values: its text, the exit code, and whether it would affect every unit."""
    trace = "".join(traceback.format_exception(error))
    while isinstance(error, BaseExceptionGroup):  # asyncio's, around the one that ended the others
        error = error.exceptions[0]
    ours = isinstance(error, SbsEdgeError)
    return {
        "failed": _said(error) if ours else f"{type(error).__name__}: {_said(error)}",
        "exit_code": error.exit_code if isinstance(error, SbsEdgeError) else 1,
        "ends_run": starting or (ours and not isinstance(error, DataError)),
        "starting": starting,
        "trace": trace,
    }


def _guarded(worker: type) -> type:
    """Return the class with its exceptions as results, because Ray would end the run at the first and hide its cause."""

    class Guarded(worker):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            self.__broken: dict[str, Any] | None = None
            try:
                super().__init__(**arguments)
            except Exception as error:
                self.__broken = _failure(error, starting=True)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            failed = self.__broken
            if failed is None:
                try:
                    done: dict[str, Any] = super().__call__(batch)
                    return done
                except (KeyboardInterrupt, SystemExit, GeneratorExit):
                    raise
                except BaseException as error:  # a panic in Rust is not an Exception
                    failed = _failure(error)
            return {"figures": [json.dumps({"unit": unit_of(batch).index, **failed})]}

    Guarded.__name__ = Guarded.__qualname__ = worker.__name__  # what Ray calls the process
    return Guarded


def _failed(failures: list[dict[str, Any]], units: list[Unit], form: str, out: str) -> SbsEdgeError:
    """Return the error of failed units, with the name and cause of the first, and what is left to do."""
    first = next((f for f in failures if f["ends_run"]), min(failures, key=lambda f: f["unit"]))
    unit = units[first["unit"]]
    where = f"{shard_name(unit, form)} (from {unit.place})"
    if first["starting"]:
        what = f"A worker could not start: {first['failed']}"
    elif first["ends_run"]:
        what = f"{first['failed'].rstrip('.')}. That ended the run at {where}"
    elif len(failures) == 1:
        what = f"{where} could not be made: {first['failed']}"
    else:
        what = f"{len(failures)} shards could not be made, the first is {where}: {first['failed']}"
    error = _ERRORS[first["exit_code"]](
        f"{what.rstrip('.')}. Finished shards are in {out}; run the same command again to make the missing ones."
    )
    error.__cause__ = RuntimeError(f"in a worker:\n{first['trace']}")  # what --debug shows
    return error


def _mapped(
    ray: Any,
    worker: type,
    arguments: dict[str, Any],
    units: list[Unit],
    workers: int,
    cpus_each: float,
    gpus_each: float,
) -> Any:
    """Return a data set whose rows are the figures of the units, each made by an actor."""
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    # An actor may die (spot machines, memory) and is restarted without limit. But a unit that
    # ends every actor must end the run, and not occupy the cluster forever.
    data = ray.data.from_items([unit.as_dict() for unit in units], override_num_blocks=len(units))
    with warnings.catch_warnings():
        # Ray 2.60 warns about retries set in this way, but has no other way to limit them.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        return data.map_batches(
            _guarded(worker),
            fn_constructor_kwargs=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus_each,
            num_gpus=gpus_each or None,
            max_restarts=-1,
            max_task_retries=UNIT_RETRIES,
        )


def _collect(
    data: Any,
    done: list[dict[str, Any]],
    failures: list[dict[str, Any]],
    on_unit: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Add each unit's figures to ``done`` or ``failures``; end early when going on is of no use."""
    in_a_row = 0
    for row in data.iter_rows():
        figures = json.loads(row["figures"])
        if "failed" in figures:
            failures.append(figures)
            in_a_row += 1
            if figures["ends_run"] or in_a_row == FAILURES_IN_A_ROW:
                return
            continue
        in_a_row = 0
        done.append(figures)
        if on_unit is not None:
            on_unit(figures)


def _sums(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums of the units' figures."""
    return {
        "rows_run": sum(int(figures["rows"]) for figures in done),
        "errors": sum(int(figures["errors"]) for figures in done),
        "busy_seconds": round(sum(figures["seconds"] for figures in done), 3),  # over all actors
        "steady_seconds": round(_span(done), 3),
        **{k: sum(f[k] for f in done) for k in ("annotated", "cost") if any(k in f for f in done)},
    }


def run_units(
    worker: type,
    worker_arguments: dict[str, Any],
    pattern: str,
    out: str,
    *,
    settings: dict[str, Any],
    workers: int = 2,
    cpus_each: float = 1.0,
    gpus_each: float = 0.0,
    shard_bytes: int = 4_000_000,
    form: str = "jsonl",
    ray_address: str | None = None,
    on_unit: Callable[[dict[str, Any]], None] | None = None,
    again: Callable[[bytes], bool] | None = None,
    with_ray: Callable[[Any, list[Unit]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run a worker over every unit; return the totals.

    Args:
        worker: a class whose instances take ``(unit, shard path parts)``, write the shard and return a
            mapping with ``rows``, ``errors`` and ``seconds``.
        worker_arguments: constructor arguments, the same on every actor.
        pattern: input files; local path, directory, pattern, or URI.
        out: folder for shards, ``_plan.json`` and ``_done.json``: a path that all nodes share, or a URI.
        settings: everything that affects the output; a folder is never continued with other settings.
        workers: number of actors.
        cpus_each: CPUs per actor; with fractions, actors share one.
        gpus_each: GPUs per actor; with fractions, actors share one.
        shard_bytes: bytes of input per unit.
        form: ``jsonl`` or ``parquet``.
        ray_address: a cluster, or None for one in this machine.
        on_unit: receives each finished unit's figures.
        again: tells from the content of a finished shard whether to make it again.
        with_ray: given Ray and all units of the plan, returns further constructor arguments (handles of actors).
    """
    if form not in SHARD_FORMATS:
        raise UsageError(f"Shards are written as {' or '.join(SHARD_FORMATS)}, not {form!r}.")
    out = out if "://" in out else os.path.abspath(out)
    folder = Folder(out)
    units = plan_units(pattern, shard_bytes)
    _plan(folder, pattern, settings, units)
    shards = {unit.index: shard_name(unit, form) for unit in units}
    there = folder.names()
    left = [
        unit
        for unit in units
        if shards[unit.index] not in there or (again is not None and again(folder.read(shards[unit.index])))
    ]
    started = time.perf_counter()
    done: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    if left:
        with session(ray_address, workers, cpus_each) as ray:
            arguments = {
                **worker_arguments,
                **(with_ray(ray, units) if with_ray else {}),
                "out": out,
                "form": form,
            }
            data = _mapped(ray, worker, arguments, left, min(workers, len(left)), cpus_each, gpus_each)
            try:
                _collect(data, done, failures, on_unit)
            except ray.exceptions.RayError as error:
                there = folder.names()
                unit = next((unit for unit in left if shards[unit.index] not in there), left[0])
                raise SbsEdgeError(
                    f"Ray ended the run ({type(error).__name__}: {_said(error)}). A unit may end every worker, "
                    "by its memory or a "
                    f"crash; the first without a shard is {shards[unit.index]} (from {unit.place}). "
                    f"Finished shards are in {out}; run the same command again to continue."
                ) from error
    if failures:
        raise _failed(failures, units, form, out)
    there = folder.names()
    missing = [index for index, name in shards.items() if name not in there]
    if missing:
        raise SbsEdgeError(
            f"{len(missing)} of {len(units)} units are unfinished; the first is unit {missing[0]}. The budget "
            "was used up, "
            "calls were left unanswered, or the server refused every call of a unit. "
            "Run the same command again; it continues with these."
        )
    totals = {
        "units": len(units),
        "units_run": len(left),
        "seconds": round(time.perf_counter() - started, 3),
        "workers": workers,
        **_sums(done),
    }
    folder.write("_done.json", files.to_json(totals, indent=2).encode("utf-8"))
    return totals
