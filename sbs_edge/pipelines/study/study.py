"""``study``: carry out every run of the grid, time the bundles, and say which student will do."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sbs_edge import files
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.findings import examine, refuse_stops, seen_by
from sbs_edge.data.targets import label_for
from sbs_edge.errors import DataError, GuardError, IntegrityError, SbsEdgeError, UsageError
from sbs_edge.lock import held
from sbs_edge.pipelines.study.conclude import conclude, group_runs, percent, score, sentences
from sbs_edge.pipelines.study.config import Run, StudyConfig, effort, plan_runs, subset
from sbs_edge.pipelines.study.execute import Order, bundle_path, execute, is_finished, order_of, write_data
from sbs_edge.pipelines.study.progress import StudyProgress
from sbs_edge.resources import ProcessPlan, plan_processes
from sbs_edge.training.student_dir import StudentDir

__all__ = ["Placement", "Plan", "plan_study", "run_study"]

FAILURES_IN_A_ROW = 3
"""Number of runs that may fail in a row, with none finished between them, before the study ends without the others."""

LATENCY_S = 4.0
"""Most seconds for the labels of one bundle, and for its rationales."""

_ERRORS = {kind.exit_code: kind for kind in (SbsEdgeError, UsageError, GuardError, IntegrityError)}
_SCRATCH_BYTES = 1_500_000_000  # a training from scratch with torch, transformers and its export


@dataclass(frozen=True, slots=True)
class Placement:
    """The place where the runs of a study are carried out.

    Attributes:
        engine: ``local``: processes of this machine; ``ray``: tasks of a cluster.
        processes: runs at once on this machine; None: as processors and memory allow.
        threads: threads of a run; None: the processors shared out evenly; Ray: 1.
        gpus: GPUs that a Ray task takes.
        ray_address: a cluster; None: Ray is started in this machine.
    """

    engine: Literal["local", "ray"] = "local"
    processes: int | None = None
    threads: int | None = None
    gpus: float = 0.0
    ray_address: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A study before it begins: its runs, which of them are finished, and how they are spread."""

    runs: list[Run]
    orders: list[Order]
    finished: list[int]
    spread: ProcessPlan
    gold: bool

    @property
    def left(self) -> list[int]:
        """Indices of the runs to be carried out."""
        done = set(self.finished)
        return [index for index in range(len(self.runs)) if index not in done]


def plan_study(
    splits: Splits, work: Path, config: StudyConfig, placement: Placement = Placement(), *, write: bool = True
) -> Plan:
    """Check everything that can be checked before a training, and return what there is to do.

    Args:
        splits: disjoint rows.
        work: the study's directory.
        config: see :class:`StudyConfig`.
        placement: see :class:`Placement`.
        write: write the rows where every process reads them.

    Raises:
        UsageError: a student, a target or the configuration is not valid.
        DataError: a share of the rows cannot be learnt from.

    """
    from sbs_edge.export.targets import check_runnable, targets_named

    check_runnable(targets_named((config.target,)))
    runs = plan_runs(config, splits)
    for rows, mode, seed in dict.fromkeys((run.rows, run.mode, run.seed) for run in runs):
        part = dataclasses.replace(splits, train=subset(splits.train, rows, seed))
        if not any(label_for(row, mode) is not None for row in part.train):
            raise DataError(
                f"None of the {len(part.train):,} training rows of a share has a label that mode {mode} learns from. Name "
                "the column, or choose a larger share."
            )
        try:
            refuse_stops(examine(seen_by(part, mode), mode))
        except DataError as error:
            raise DataError(
                f"{rows:,} of {len(splits.train):,} training rows are too few: {error}"
            ) from error
    judging = [*splits.validation, *splits.test]
    gold = any(row.label is not None for row in judging)
    if not gold and not any(row.teacher_label is not None for row in judging):
        raise DataError(
            "No validation or test row has a gold or a teacher's label, so no student can be judged."
        )
    data = write_data(work, splits) if write else work / "data"
    spread = _spread(runs, placement)
    orders = [order_of(run, config, splits, work, data, gold, spread.threads) for run in runs]
    first: dict[str, str] = {}
    for order in orders:
        if order["key"] in first:
            raise UsageError(
                f"Two runs would train the same student: {first[order['key']]!r} and {order['name']!r}. Leave out one of "
                "the students, or one of the shares if they come to the same number of rows."
            )
        first[order["key"]] = order["name"]
    finished = [index for index, order in enumerate(orders) if is_finished(order)]
    return Plan(runs, orders, finished, spread, gold)


def _spread(runs: Sequence[Run], placement: Placement) -> ProcessPlan:
    if placement.engine == "ray":
        threads = placement.threads or 1
        return ProcessPlan(placement.processes or plan_processes(len(runs), 1, threads).processes, threads)
    from sbs_edge.training.checkpoint import open_checkpoint, weight_files

    memory = _SCRATCH_BYTES
    for model in {run.config.model for run in runs if run.config.model is not None}:
        weights = sum(path.stat().st_size for path in weight_files(open_checkpoint(model).folder))
        memory = max(
            memory, _SCRATCH_BYTES + 7 * weights
        )  # weights, gradients, two moments, the best, the export
    on_gpu = any(Path("/dev").glob("nvidia[0-9]*"))  # runs of several processes would share its memory
    processes = placement.processes or (1 if on_gpu else None)
    if processes is None:
        return plan_processes(len(runs), memory, placement.threads)
    return ProcessPlan(processes, placement.threads or max(1, plan_processes(1, 1).threads // processes))


def run_study(
    splits: Splits,
    work: Path,
    config: StudyConfig,
    placement: Placement = Placement(),
    *,
    out: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Carry out a study, or what is left of it; return its document as plain values.

    Runs are carried out in processes that import the calling script again, so a script calls this under
    ``if __name__ == "__main__":``, as with :mod:`multiprocessing`.

    Every student sees label examples for the same number of steps. Students are chosen on validation rows.

    Args:
        splits: disjoint rows.
        work: the study's directory; finished runs in it are not carried out again.
        config: see :class:`StudyConfig`.
        placement: see :class:`Placement`.
        out: where the chosen student's bundle is written; None: nowhere.
        say: receives one line a stage.

    Raises:
        UsageError: a student, a target or the configuration is not valid, or another process works in ``work``.
        DataError: a share of the rows cannot be learnt from.
        SbsEdgeError: a run failed; finished ones are kept.

    Example:
        >>> from sbs_edge.data.builtin import builtin_splits
        >>> from sbs_edge.pipelines.study.config import StudyConfig
        >>> found = run_study(builtin_splits(), Path("runs/study"), StudyConfig(seeds=1))
        >>> print(found["sentences"][0])

    """
    if out is not None:
        files.check_replaceable(out, ("manifest.json",), "bundle")
    began = time.perf_counter()
    with held(work, "study"):
        plan = plan_study(splits, work, config, placement)
        say(
            f"{len(plan.runs)} runs, {len(plan.finished)} of them finished earlier; {plan.spread.processes} at once, "
            f"{plan.spread.threads} thread(s) each"
        )
        found = _carry_out(plan, work, placement)
        say(f"timing {len(plan.runs)} bundles, one at a time")
        timed = [_timed(order, splits) for order in plan.orders]
        say("training the linear baseline")
        from sbs_edge.pipelines.linear import linear_baseline

        linear = linear_baseline(splits, plan.gold)
    runs = [
        {
            "method": run.method, "mode": run.mode, "student": run.student, "share": run.share, "rows": run.rows,
            "seed": run.seed, **figures, **times,
        }
        for run, figures, times in zip(plan.runs, found, timed, strict=True)
    ]  # fmt: skip
    groups = group_runs(runs)
    teacher = _teacher_accuracy(splits)
    concluded = conclude(groups, runs, config.within, teacher)
    chosen = _bundle_of(concluded["chosen"], runs, plan)
    if out is not None:
        from sbs_edge.runtime.student import Student

        with Student.load(chosen) as student:
            student.save_pretrained(out)
    return {
        "task": StudentDir.task_card(splits.task),
        "rows": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        "judged_by": "gold labels" if plan.gold else "the teacher's labels",
        "grid": {
            "methods": list(dict.fromkeys(run.method for run in plan.runs)),
            "modes": list(dict.fromkeys(run.mode for run in plan.runs)),
            "shares": sorted({run.share for run in plan.runs}),
            "students": [spec.name for spec in config.specs()],
            "seeds": sorted({run.seed for run in plan.runs}),
            "steps": config.steps,
            "target": config.target,
        },
        "linear": linear,
        "runs": runs,
        "groups": groups,
        "conclusions": concluded,
        "sentences": sentences(concluded, linear),
        "bundle": str(work / chosen.relative_to(work.resolve()) if out is None else out),
        "runs_before": len(plan.finished),
        "at_once": plan.spread.processes,
        "threads": plan.spread.threads,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _carry_out(plan: Plan, work: Path, placement: Placement) -> list[dict[str, Any]]:
    """Return the figures of every run, in the plan's order."""
    found = {index: execute(plan.orders[index]) for index in plan.finished}  # reads a file each
    efforts = [effort(run.config) for run in plan.runs]
    progress = StudyProgress(efforts, plan.spread.processes, plan.finished)
    failures: list[tuple[int, dict[str, Any]]] = []
    in_a_row = 0
    try:
        for item in _results(plan, work, placement):
            if item is None:
                progress.tick()
                continue
            index, figures = plan.left[item[0]], item[1]
            name = plan.runs[index].name
            if "failed" in figures:
                failures.append((index, figures))
                in_a_row += 1
                progress.finish(index, f"{name}: failed")
                if in_a_row == FAILURES_IN_A_ROW:
                    break
                continue
            in_a_row = 0
            found[index] = figures
            reached = figures["accuracy"]["validation"] or figures["accuracy"]["test"]
            progress.finish(index, f"{name}: {percent(reached and reached['share'])}")
    finally:
        progress.close()
    if failures:
        raise _failed(failures, plan, work)
    return [found[index] for index in range(len(plan.runs))]


def _results(plan: Plan, work: Path, placement: Placement) -> Iterator[tuple[int, dict[str, Any]] | None]:
    orders = [plan.orders[index] for index in plan.left]
    if placement.engine == "ray":
        from sbs_edge.scale.tasks import run_as_tasks

        return run_as_tasks(
            execute, orders, cpus_each=plan.spread.threads, gpus_each=placement.gpus, at_once=plan.spread.processes,
            ray_address=placement.ray_address,
        )  # fmt: skip
    from sbs_edge.pipelines.processes import run_in_processes

    return run_in_processes(execute, orders, plan.spread.processes, work / "processes.log")


def _failed(failures: Sequence[tuple[int, dict[str, Any]]], plan: Plan, work: Path) -> SbsEdgeError:
    index, first = failures[0]
    cause = str(first["failed"]).rstrip(".")
    what = f"The run {plan.runs[index].name!r} failed: {cause}."
    if len(failures) > 1:
        what = f"{len(failures)} of {len(plan.runs)} runs failed; the first is {plan.runs[index].name!r}: {cause}."
    kind = _ERRORS.get(first["exit_code"], SbsEdgeError)
    return kind(f"{what} Finished runs are kept in {work}; the same command carries out the others.")


def _timed(order: Order, splits: Splits) -> dict[str, Any]:
    """Return the latency of a bundle on this machine; one measured here before is not measured again."""
    from sbs_edge.pipelines.measure import label_latency, rationale_latency
    from sbs_edge.runtime.student import Student

    path, here = Path(order["folder"]) / f"latency-{order['target']}.json", _this_machine()
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.pop("machine") == here:
            return dict(kept)
    rows = splits.test or splits.validation
    with Student.load(bundle_path(order), threads=1) as student:
        roles = set(student.manifest["targets"][order["target"]])
        times = {
            "label_ms": label_latency(student, rows, LATENCY_S),
            "rationale_ms": rationale_latency(student, rows, LATENCY_S)
            if roles & {"explainer", "decoder_step"}
            and order["config"]["mode"] not in ("finetune", "distill")
            else None,
        }
    files.write_json(path, {"machine": here, **times})
    return times


def _this_machine() -> str:
    """Return what latencies depend on, as one line."""
    import platform
    from importlib import metadata

    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass
    return f"{model}, onnxruntime {metadata.version('onnxruntime')}"


def _teacher_accuracy(splits: Splits) -> dict[str, float | None] | None:
    """Return how often the teacher's labels are right on validation and test rows; None where that is unknown."""

    def share(rows: Sequence[Example]) -> float | None:
        gold = [row for row in rows if row.label is not None]
        if not any(row.teacher_label is not None for row in gold):
            return None
        # A row that the teacher left without a usable answer counts as wrong.
        right = sum(
            row.teacher_label is not None
            and same_answer(row.label or "", row.teacher_label, splits.task.compare)
            for row in gold
        )
        return right / len(gold)

    found = {"validation": share(splits.validation), "test": share(splits.test)}
    return found if any(value is not None for value in found.values()) else None


def _bundle_of(chosen: dict[str, Any], runs: Sequence[dict[str, Any]], plan: Plan) -> Path:
    """Return the bundle of the chosen group's best seed on validation rows."""
    own = [
        (score(group_runs([run])[0]), -run["seed"], index)
        for index, run in enumerate(runs)
        if all(run[name] == chosen[name] for name in ("method", "student", "share"))
    ]
    return bundle_path(plan.orders[max(own)[2]])
