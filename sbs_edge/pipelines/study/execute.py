"""One run of a study: train a student, export it, and count its right answers. Runs in a process of its own.

A run's directory is ``WORK/runs/KEY/``, where KEY is a digest of everything that changes the student. It holds
``student/``, a bundle for each target, and the figures; each is written as a whole, and one that is there is not
made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sbs_edge import __version__, files
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.errors import SbsEdgeError
from sbs_edge.pipelines.study.config import Run, StudyConfig, subset
from sbs_edge.resources import share_cpus
from sbs_edge.training.student_dir import StudentDir

__all__ = [
    "Order",
    "accuracy_of",
    "bundle_path",
    "execute",
    "is_finished",
    "order_of",
    "result_path",
    "rows_digest",
    "write_data",
]

Order = dict[str, Any]
"""A run as plain values, for another process or machine."""

# Fields that change how a training is carried out, and not what it gives.
_EXECUTION = {
    "threads",
    "progress",
    "trackers",
    "resume",
    "save_steps",
    "keep_checkpoints",
    "eval_batch_size",
}
_SPLITS = ("train", "validation", "test")


def rows_digest(rows: Iterable[Example]) -> str:
    """Return a digest of everything in the rows that training or evaluation reads."""
    names = [each.name for each in dataclasses.fields(Example) if each.name not in ("id", "source")]
    digest = hashlib.sha256()
    for row in rows:
        values = [getattr(row, name) for name in names]
        digest.update(repr(values).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def write_data(work: Path, splits: Splits) -> Path:
    """Write the rows where every process reads them, once for each content; return their directory."""
    from sbs_edge.data.jsonl import write_examples

    task = StudentDir.task_card(splits.task)
    parts = {name: getattr(splits, name) for name in _SPLITS}
    identity = json.dumps([task, *map(rows_digest, parts.values())])
    folder = work / "data" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if not (folder / "task.json").is_file():
        with files.atomic_directory(folder) as made:
            for name, rows in parts.items():
                write_examples(made / f"{name}.jsonl", rows)
            files.write_json(made / "task.json", task)
    return folder


@lru_cache(maxsize=2)
def _read_data(folder: str) -> Splits:
    from sbs_edge.data.readers import stream_examples

    root = Path(folder)
    task = json.loads((root / "task.json").read_text(encoding="utf-8"))
    spec = TaskSpec(task["name"], task["label_kind"], tuple(task["labels"]), task["compare"])
    parts: dict[str, Any] = {
        name: list(stream_examples(root / f"{name}.jsonl")) if (root / f"{name}.jsonl").stat().st_size else []
        for name in _SPLITS
    }
    return Splits(spec, **parts)


def order_of(
    run: Run, config: StudyConfig, splits: Splits, work: Path, data: Path, gold: bool, threads: int
) -> Order:
    """Return the run as plain values.

    Args:
        run: the run.
        config: the study's configuration.
        splits: all rows.
        work: the study's directory; every node of a cluster sees it under this path.
        data: the directory that :func:`write_data` wrote.
        gold: whether gold labels judge the answers, or the teacher's.
        threads: threads that the run may use.

    """
    settings = {k: v for k, v in run.config.model_dump(mode="json").items() if k not in _EXECUTION}
    identity = {
        "training": settings,
        "checkpoint": None if run.config.model is None else _checkpoint_digest(run.config.model),
        "task": StudentDir.task_card(splits.task),
        "train": rows_digest(subset(splits.train, run.rows, run.seed)),
        "validation": rows_digest(splits.validation),
        "versions": _versions(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    judged = json.dumps(
        [gold, config.evaluation_rows, rows_digest(splits.validation), rows_digest(splits.test)]
    )
    return {
        "key": key,
        "name": run.name,
        "folder": str(work.resolve() / "runs" / key),
        "data": str(data.resolve()),
        "rows": run.rows,
        "seed": run.seed,
        "config": run.config.model_dump(mode="json"),
        "target": config.target,
        "gold": gold,
        "evaluation_rows": config.evaluation_rows,
        "result": f"{config.target}-{hashlib.sha256(judged.encode()).hexdigest()[:8]}.json",
        "threads": threads,
    }


def result_path(order: Order) -> Path:
    """Return the file that holds the run's figures once it is finished."""
    return Path(order["folder"]) / str(order["result"])


def bundle_path(order: Order) -> Path:
    """Return the run's bundle."""
    return Path(order["folder"]) / f"bundle-{order['target']}"


def is_finished(order: Order) -> bool:
    """Return whether the run was carried out: its figures and its bundle are there."""
    return result_path(order).is_file() and (bundle_path(order) / "manifest.json").is_file()


def execute(order: Order) -> dict[str, Any]:
    """Carry out a run, or what is left of it; return its figures, or ``failed`` and ``exit_code``."""
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, _said_to(log):
        try:
            return _execute(order, folder)
        except SbsEdgeError as error:
            return {"failed": str(error), "exit_code": error.exit_code}
        except Exception as error:
            traceback.print_exc(file=log)
            said = " ".join(str(error).split())[:300]
            return {"failed": f"{type(error).__name__}: {said} (see {folder / 'log.txt'})", "exit_code": 1}


@contextlib.contextmanager
def _said_to(log: io.TextIOBase | Any) -> Any:
    with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        yield


def _execute(order: Order, folder: Path) -> dict[str, Any]:
    if is_finished(order):
        return dict(json.loads(result_path(order).read_text(encoding="utf-8")))
    share_cpus(order["threads"])
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):  # read when torch and tokenizers are loaded
        os.environ.setdefault(name, str(order["threads"]))
    from sbs_edge.runtime.student import Student

    splits = _read_data(order["data"])
    trained = _trained(order, folder, splits)
    manifest = _exported(order, folder)
    with Student.load(bundle_path(order), threads=order["threads"], prepacked_cache=False) as student:
        accuracy = {
            name: accuracy_of(
                student, getattr(splits, name), splits.task, order["gold"], order["evaluation_rows"]
            )
            for name in ("validation", "test")
        }
    check = manifest["targets"][order["target"]]["accuracy"]
    figures = {
        "format": 1,
        "key": order["key"],
        "parameters": trained["metrics"]["parameters"],
        "layers": trained["metrics"]["layers"],
        "steps": trained["metrics"]["steps"],
        "best_step": trained["metrics"].get("best_step"),
        "dropped_rows": trained["metrics"].get("dropped_rows", 0),
        "train_seconds": trained["seconds"],
        "train_cpu_seconds": trained["cpu_seconds"],
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "accuracy": accuracy,
        "drop_points": None if check is None else round(check["drop_points"], 3),
    }
    files.write_json(result_path(order), figures)
    return figures


def _trained(order: Order, folder: Path, splits: Splits) -> dict[str, Any]:
    """Train the student, or go on from its newest checkpoint, unless it is there."""
    from sbs_edge.training.config import TrainConfig
    from sbs_edge.training.train import DROPPED, train

    student, record = folder / "student", folder / "train.json"
    if (student / "sbs_edge.json").is_file():
        if record.is_file():
            return dict(json.loads(record.read_text(encoding="utf-8")))
        metrics = StudentDir.load(student).card["training"]
        return {"metrics": metrics, "seconds": None, "cpu_seconds": None}
    began, cpu = time.perf_counter(), time.process_time()
    rows = subset(splits.train, order["rows"], order["seed"])
    settings = TrainConfig(**order["config"]).model_copy(
        update={"threads": order["threads"], "progress": False, "trackers": (), "resume": True}
    )
    parts = Splits(splits.task, rows, splits.validation)
    result = train(parts, out=student, config=settings)
    trained = {
        "metrics": result.metrics,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    files.write_json(record, trained)
    work = folder / "student.training"
    if (work / DROPPED).is_file():
        os.replace(work / DROPPED, folder / DROPPED)
    shutil.rmtree(work, ignore_errors=True)
    return trained


def _exported(order: Order, folder: Path) -> dict[str, Any]:
    """Export the student unless its bundle is there; return the manifest."""
    from sbs_edge.export.api import export
    from sbs_edge.runtime.manifest import read_manifest

    bundle = bundle_path(order)
    if not (bundle / "manifest.json").is_file():
        # The bundle itself is judged on validation and test rows, so the check against float32 only informs.
        export(
            folder / "student",
            bundle,
            targets=(order["target"],),
            max_drop=100.0,
            min_rationale_agreement=0.0,
        )
    return dict(read_manifest(bundle))


def accuracy_of(
    student: Any, rows: Sequence[Example], task: TaskSpec, gold: bool, most: int
) -> dict[str, Any] | None:
    """Return the share of right labels and of how many rows, or None where no row has a label to judge by.

    Args:
        student: a loaded bundle.
        rows: of one split.
        task: says when two labels are equal.
        gold: judge by gold labels, or by the teacher's.
        most: rows asked at most, the same ones in every run.

    """
    import random

    from sbs_edge.data.answers import same_answer
    from sbs_edge.pipelines.measure import answers

    def wanted(row: Example) -> str | None:
        return row.label if gold else row.teacher_label

    judged = [row for row in rows if wanted(row) is not None]
    if len(judged) > most:
        judged = random.Random(0).sample(judged, most)
    if not judged:
        return None
    found = answers(student, judged)
    right = sum(same_answer(a, wanted(row) or "", task.compare) for a, row in zip(found, judged, strict=True))
    return {"share": right / len(judged), "n": len(judged)}


@lru_cache(maxsize=8)
def _checkpoint_digest(model: str) -> str:
    """Return a digest of a checkpoint's weights, configuration and tokenizer."""
    from sbs_edge.training.checkpoint import open_checkpoint, weight_files

    checkpoint = open_checkpoint(model)
    paths = {*weight_files(checkpoint.folder), *checkpoint.folder.glob("*.json")}
    paths |= set(checkpoint.folder.glob("*.model"))
    if checkpoint.adapter is not None:
        paths |= {path for path in checkpoint.adapter.iterdir() if path.is_file()}
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as handle:
            digest.update(f"{path.name} {hashlib.file_digest(handle, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {"sbs-edge": __version__, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in ("torch", "transformers", "tokenizers", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
