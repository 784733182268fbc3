"""Predict with Ray: each actor has a :class:`~sbs_edge.runtime.student.Student`."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sbs_edge.data.questions import Unanswerable, answers_of, choices_of, id_of, text_of
from sbs_edge.data.rows import printable
from sbs_edge.errors import IntegrityError, UsageError
from sbs_edge.runtime.answers import answer_document
from sbs_edge.runtime.texts import over_limit
from sbs_edge.scale.run import run_units
from sbs_edge.scale.units import read_unit, shard_name, unit_of, write_shard
from sbs_edge.tokens import most_characters

__all__ = ["COLUMNS", "PredictWorker", "answer_rows", "predict_with_ray"]

COLUMNS = {
    "id": "string", "label": "string", "probability": "double", "probabilities": "string", "abstained": "bool",
    "truncated": "bool", "rationale": "string", "rationale_complete": "bool", "error": "string",
}  # fmt: skip
"""Columns of a Parquet shard, the same in every shard, because readers of a folder use the first file's for all."""


def columns_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of a Parquet shard; those of a bundle that reads inputs in chunks say in how many."""
    return COLUMNS | ({"n_chunks": "int64"} if manifest.get("long") else {})


class _Question(NamedTuple):
    """A row that can be answered; ``place`` counts the rows of its unit."""

    place: int
    text: str
    choices: list[str] | None


def answer_rows(
    student: Any,
    rows: list[tuple[str, Any]],
    *,
    field: str = "input",
    labels: list[str] | None = None,
    explain: bool = False,
    truncate: bool = False,
    abstain_below: float | None = None,
) -> list[dict[str, Any]]:
    """Return an answer for each row, in order; a row that cannot be answered has an ``error`` instead.

    The student forms token-budget batches itself, over all rows it is given.
    """
    answers: list[dict[str, Any]] = []
    good: list[_Question] = []
    for place, row in rows:
        identity: Any = printable(place)
        try:
            if isinstance(row, str):
                raise Unanswerable(row)
            if "id" in row:
                identity = id_of(row["id"])
            choices = None if labels else choices_of(row.get("choices"))
            good.append(_Question(len(answers), text_of(row, field), choices))
            answers.append({"id": identity})
        except Unanswerable as problem:
            answers.append({"id": identity, "error": printable(str(problem))})
    good, tokens = _short_enough(student, good, answers, explain, truncate)
    predictions = answers_of(
        student, [q.text for q in good], [q.choices for q in good], labels or None, tokens=tokens["label"],
        truncate=truncate, abstain_below=abstain_below,
    )  # fmt: skip
    told = [i for i, prediction in enumerate(predictions) if not isinstance(prediction, UsageError)]
    rationales: dict[int, Any] = {}
    if explain and told:
        texts, known = [good[i].text for i in told], [tokens["rationale"][i] for i in told]
        rationales = dict(zip(told, student.explain(texts, tokens=known, truncate=truncate), strict=True))
    for i, (question, prediction) in enumerate(zip(good, predictions, strict=True)):
        if isinstance(prediction, UsageError):
            answers[question.place]["error"] = printable(str(prediction))
        else:
            answers[question.place] |= answer_document(prediction, rationales.get(i))
    return answers


def _short_enough(
    student: Any, good: list[_Question], answers: list[dict[str, Any]], explain: bool, cut: bool
) -> tuple[list[_Question], dict[str, list[list[int]]]]:
    """Tokenise once; leave out rows over the limit with an error, unless they may be cut."""
    texts = [question.text for question in good]
    tasks = ("label", "rationale") if explain else ("label",)
    tokens = {task: student.tokenize(texts, task) if texts else [] for task in tasks}
    limit = student.max_input_tokens
    kept = []
    for i, question in enumerate(good):
        count = max(len(tokens[task][i]) for task in tasks)
        if cut or (count <= limit and len(question.text) <= most_characters(limit)):
            kept.append(i)
        else:
            answers[question.place]["error"] = over_limit("It", question.text, count, limit, "truncate")
    return [good[i] for i in kept], {task: [rows[i] for i in kept] for task, rows in tokens.items()}


def digests_of(manifest: Mapping[str, Any]) -> list[str]:
    """Return the sorted digests of a bundle's files, which are equal only for the same bundle."""
    return sorted(entry["sha256"] for entry in manifest["files"].values())


class PredictWorker:
    """An actor that loads the bundle once, then turns units into shards."""

    def __init__(
        self,
        bundle: str,
        out: str,
        form: str,
        target: str | None,
        threads: int,
        options: dict[str, Any],
        bundle_files: list[str],
    ) -> None:
        from sbs_edge.runtime.student import Student

        self._student = Student.load(bundle, target=target, threads=threads)
        if digests_of(self._student.manifest) != bundle_files:  # a dead actor is restarted later
            raise IntegrityError(
                f"The bundle {bundle} is not the one that this run started with: it was replaced, or another "
                "is at this path on this node. Restore the first one and start the command again."
            )
        # Ray's modules and the student stay in use, so the garbage collector need not scan them again and again.
        gc.collect()
        gc.freeze()
        self._out, self._form, self._options = out, form, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Work on one unit (a batch of one row) and return its figures as JSON."""
        unit = unit_of(batch)
        started = time.perf_counter()
        rows = list(read_unit(unit))
        answers = answer_rows(self._student, rows, **self._options)
        write_shard(self._out, shard_name(unit, self._form), answers, columns_of(self._student.manifest))
        figures = {
            "unit": unit.index,
            "rows": len(rows),
            "errors": sum("error" in answer for answer in answers),
            "seconds": time.perf_counter() - started,
            "ended": time.time(),
        }
        return {"figures": [json.dumps(figures)]}


def predict_with_ray(
    bundle: str | Path,
    pattern: str,
    out: str | Path,
    *,
    target: str | None = None,
    field: str = "input",
    labels: list[str] | None = None,
    explain: bool = False,
    truncate: bool = False,
    abstain_below: float | None = None,
    threads: int = 1,
    workers: int = 2,
    cpus_each: float | None = None,
    gpus_each: float = 0.0,
    shard_bytes: int = 4_000_000,
    form: str = "jsonl",
    ray_address: str | None = None,
    on_unit: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Answer every row of the files that match ``pattern`` into shards under ``out``.

    Args:
        bundle: a bundle's directory, at the same path on every node.
        pattern: JSON Lines or Parquet: path, directory, pattern or URI.
        out: folder for the shards; another run writes only the missing ones.
        target: target of the bundle; None: its default.
        field: field of a row that has the text.
        labels: the labels to choose from; None: the bundle's labels, or each row's ``choices``.
        explain: add rationales.
        truncate: cut inputs over the limit instead of answering them with an error.
        abstain_below: overrides the bundle's threshold.
        threads: threads of each student, and the CPUs of its actor unless ``cpus_each`` is given.
        workers: number of actors.
        cpus_each: CPUs per actor; with fractions, actors share one.
        gpus_each: GPUs per actor.
        shard_bytes: bytes of input per shard.
        form: ``jsonl`` or ``parquet``.
        ray_address: a cluster, or None for one in this machine.
        on_unit: receives each finished unit's figures.

    Returns:
        Totals: units, rows, errors, seconds.
    """
    folder = Path(bundle).resolve()
    if not (folder / "manifest.json").is_file():
        raise UsageError(f"{bundle} is not a bundle: it has no manifest.json.")
    options = {
        "field": field,
        "labels": labels,
        "explain": explain,
        "truncate": truncate,
        "abstain_below": abstain_below,
    }
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    settings = {
        **options,
        "target": target or manifest.get("default_target"),
        "form": form,
        **({"columns": columns_of(manifest)} if form == "parquet" else {}),
        "bundle_files": digests_of(manifest),
    }
    return run_units(
        PredictWorker,
        {
            "bundle": str(folder),
            "target": target,
            "threads": threads,
            "options": options,
            "bundle_files": settings["bundle_files"],
        },
        pattern if "://" in pattern else str(Path(pattern).absolute()),
        str(out),
        settings=settings,
        workers=workers,
        cpus_each=float(threads) if cpus_each is None else cpus_each,
        gpus_each=gpus_each,
        shard_bytes=shard_bytes,
        form=form,
        ray_address=ray_address,
        on_unit=on_unit,
    )
