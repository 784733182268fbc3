"""``predict --engine ray``: one :class:`~sbs_edge.runtime.student.Student` an actor."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbs_edge.errors import UsageError
from sbs_edge.scale.run import run_units
from sbs_edge.scale.units import read_unit, shard_name, unit_of, write_shard

__all__ = ["PredictWorker", "answer_rows", "predict_with_ray"]


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
    """Return one answer a row, in order; a row that cannot be answered carries ``error`` instead.

    The student forms token-budget batches itself, over all rows it is given.
    """
    answers: list[dict[str, Any]] = []
    good: list[tuple[int, str, Any]] = []
    for place, row in rows:
        problem = row if isinstance(row, str) else None
        text = None if problem else row.get(field)
        if problem is None and (not isinstance(text, str) or not text.strip()):
            problem = f"no text in the field {field!r}"
        identity = place if isinstance(row, str) else row.get("id", place)
        if not isinstance(identity, str | int | float | None):
            identity = str(identity)  # Parquet knows dates and decimals, JSON does not
        answers.append({"id": identity, **({"error": problem} if problem else {})})
        if problem is None:
            good.append((len(answers) - 1, str(text), None if labels else row.get("choices")))
    good, tokens = _short_enough(student, good, answers, explain, truncate)

    def answer(part: list[int]) -> None:
        texts = [good[i][1] for i in part]
        given: Any = labels
        if any(good[i][2] is not None for i in part):
            given = [student.labels if good[i][2] is None else list(dict.fromkeys(good[i][2])) for i in part]
        options: dict[str, Any] = {"truncate": truncate}
        predictions = student.predict(
            texts, labels=given, abstain_below=abstain_below,
            tokens=[tokens["label"][i] for i in part], **options,
        )  # fmt: skip
        rationales: list[Any] = [None] * len(part)
        if explain:
            rationales = student.explain(texts, tokens=[tokens["rationale"][i] for i in part], **options)
        for i, prediction, rationale in zip(part, predictions, rationales, strict=True):
            answers[good[i][0]] |= _as_json(prediction, rationale)

    everything = list(range(len(good)))
    try:
        if everything:
            answer(everything)
    except (UsageError, TypeError):
        if all(choices is None for _, _, choices in good):
            raise  # nothing that one row could be to blame for
        for i in everything:  # some row's own choices cannot be used: find out which
            try:
                answer([i])
            except (UsageError, TypeError) as error:
                answers[good[i][0]]["error"] = str(error)
    return answers


def _short_enough(
    student: Any, good: list[tuple[int, str, Any]], answers: list[dict[str, Any]], explain: bool, cut: bool
) -> tuple[list[tuple[int, str, Any]], dict[str, list[list[int]]]]:
    """Tokenise once; mark rows over the limit as errors and leave them out, unless they may be cut."""
    texts = [text for _, text, _ in good]
    tasks = ("label", "rationale") if explain else ("label",)
    tokens = {task: student.tokenize(texts, task) if texts else [] for task in tasks}
    limit = student.limits["max_source_tokens"]
    kept = []
    for i, (place, _, _) in enumerate(good):
        count = max(len(tokens[task][i]) for task in tasks)
        if cut or count <= limit:
            kept.append(i)
        else:
            answers[place]["error"] = f"{count} tokens, the limit is {limit}"
    return [good[i] for i in kept], {task: [rows[i] for i in kept] for task, rows in tokens.items()}


def _as_json(prediction: Any, rationale: Any) -> dict[str, Any]:
    found = {
        "label": prediction.label,
        "probability": prediction.probability,
        "probabilities": prediction.probabilities,
        "abstained": prediction.abstained,
        "truncated": prediction.truncated,
    }
    if rationale is not None:
        found |= {"rationale": rationale.rationale, "rationale_complete": rationale.complete}
    return found


class PredictWorker:
    """An actor: loads the bundle once, then turns units into shards."""

    def __init__(
        self,
        bundle: str,
        out: str,
        form: str,
        target: str | None,
        threads: int,
        options: dict[str, Any],
    ) -> None:
        from sbs_edge.runtime.student import Student

        self._student = Student.load(bundle, target=target, threads=threads)
        # Ray's modules and the student are no garbage: left to the collector, each of its rounds reads them all.
        gc.collect()
        gc.freeze()
        self._out, self._form, self._options = out, form, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Work on one unit (a batch of one row) and return its figures as JSON."""
        unit = unit_of(batch)
        started = time.perf_counter()
        rows = list(read_unit(unit))
        answers = answer_rows(self._student, rows, **self._options)
        write_shard(self._out, shard_name(unit, self._form), answers)
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
    """Answer every row of the files that fit ``pattern`` into shards under ``out``.

    Args:
        bundle: a bundle's directory, at the same path on every node.
        pattern: JSON Lines or Parquet: path, directory, pattern or URI.
        out: folder for the shards; started again, only missing ones are made.
        target: target of the bundle; None: its default.
        field: field of a row that holds the text.
        labels: choose among these; None: the bundle's labels, or each row's ``choices``.
        explain: add rationales.
        truncate: cut inputs over the limit instead of answering them with an error.
        abstain_below: overrides the bundle's threshold.
        threads: threads of one student, and the CPUs its actor takes unless ``cpus_each`` says otherwise.
        workers: actors.
        cpus_each: CPUs an actor takes of a node; fractions let actors share.
        gpus_each: GPUs an actor takes.
        shard_bytes: bytes of input a shard.
        form: ``jsonl`` or ``parquet``.
        ray_address: a cluster, or None for one in this machine.
        on_unit: receives each finished unit's figures.

    Returns:
        Totals: units, rows, errors, seconds.

    """
    folder = Path(bundle).resolve()
    if not (folder / "manifest.json").is_file():
        raise UsageError(f"{bundle} is no bundle: it has no manifest.json.")
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
        "bundle_files": sorted(entry["sha256"] for entry in manifest["files"].values()),
    }
    return run_units(
        PredictWorker,
        {"bundle": str(folder), "target": target, "threads": threads, "options": options},
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
