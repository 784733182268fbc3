"""``sbs-edge study``: train a grid of students, and say which is small enough and how many rows it takes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sbs_edge import files
from sbs_edge.cli._common import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    need,
    print_json,
    resolved,
    save_resolved,
)
from sbs_edge.cli._data_options import (
    ColumnOption,
    Compare,
    CompareOption,
    DataArgument,
    DatasetOption,
    DecoderLayersOption,
    EncoderLayersOption,
    LabelKindOption,
    SkipBadRowsOption,
    TaskOption,
    TeacherErrorOption,
    TeacherSamplesOption,
    TestOption,
    ValidationOption,
)
from sbs_edge.cli._fields import parse_fields
from sbs_edge.cli.export import EXPORTING
from sbs_edge.cli.train import TRAINING
from sbs_edge.errors import UsageError

__all__ = ["register"]


class StudyMethod(StrEnum):
    """The training methods."""

    step_by_step = "step-by-step"
    label_only = "label-only"


class Labels(StrEnum):
    """The labels to learn."""

    gold = "gold"
    teacher = "teacher"


class StudyEngine(StrEnum):
    """The ways to execute the runs."""

    local = "local"
    ray = "ray"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def study(
        ctx: typer.Context,
        data: DataArgument = "builtin",
        work: Annotated[
            Path,
            typer.Option(
                help="Directory of the runs, study.json and study.html; finished runs in it are not repeated."
            ),
        ] = Path("runs/study"),
        out: Annotated[
            Path | None,
            typer.Option(
                help="Write the chosen student's bundle to this directory; an old bundle is replaced."
            ),
        ] = None,
        dataset: DatasetOption = None,
        validation: ValidationOption = None,
        test: TestOption = None,
        task: TaskOption = None,
        label_kind: LabelKindOption = None,
        compare: CompareOption = Compare.text,
        column: ColumnOption = None,
        skip_bad_rows: SkipBadRowsOption = False,
        train_rows: Annotated[
            int | None,
            typer.Option(min=1, help="Use at most this many training rows; shares are parts of these."),
        ] = None,
        teacher_error: TeacherErrorOption = 0.0,
        teacher_samples: TeacherSamplesOption = 1,
        method: Annotated[
            list[StudyMethod] | None, typer.Option(help="step-by-step or label-only. Default: both.")
        ] = None,
        labels: Annotated[
            Labels | None,
            typer.Option(help="Learn gold or teacher labels. Default: gold if there are any."),
        ] = None,
        share: Annotated[
            list[float] | None,
            typer.Option(min=0, max=1, help="Share of the training rows. Default: 0.25, 0.5 and 1."),
        ] = None,
        student: Annotated[
            list[str] | None,
            typer.Option(
                metavar="SHAPE",
                help="A student: ENCODER/DECODER layers such as 6/2, FIELD=VALUE such as d_model=32, or several of "
                "these with spaces between.",
            ),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(
                help="T5-family checkpoint, by hub name or directory. Default: students from scratch."
            ),
        ] = None,
        encoder_layers: EncoderLayersOption = None,
        decoder_layers: DecoderLayersOption = None,
        seeds: Annotated[
            int, typer.Option(min=1, help="Number of trainings of each point, whose spread is shown.")
        ] = 2,
        steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of every training.")] = 600,
        training: Annotated[
            list[str] | None,
            typer.Option(help="FIELD=VALUE for any option of train, for all students alike."),
        ] = None,
        seed: Annotated[int, typer.Option(min=0, help="The first seed, and the seed of the data.")] = 0,
        within: Annotated[
            float,
            typer.Option(
                min=0,
                max=100,
                help="Points of accuracy by which the smallest student may be worse than the best.",
            ),
        ] = 1.0,
        target: Annotated[str, typer.Option(help="Export target of every student.")] = "cpu-int8",
        evaluation_rows: Annotated[
            int,
            typer.Option(
                min=1, help="Largest number of validation rows, and of test rows, that evaluate a student."
            ),
        ] = 2000,
        engine: Annotated[
            StudyEngine,
            typer.Option(
                help="local: processes on this machine. ray: tasks of a cluster whose nodes see --work under the same path."
            ),
        ] = StudyEngine.local,
        processes: Annotated[
            int | None,
            typer.Option(
                min=1, help="Runs at once on this machine. Default: as many as processors and memory allow."
            ),
        ] = None,
        threads: Annotated[
            int | None,
            typer.Option(
                min=1, help="Threads per run. Default: an equal part of the processors; with Ray 1."
            ),
        ] = None,
        worker_gpus: Annotated[
            float, typer.Option(min=0, help="Ray: GPUs per run, fractions allowed.")
        ] = 0.0,
        ray_address: Annotated[
            str | None, typer.Option(help="Address of a Ray cluster. Default: start one on this machine.")
        ] = None,
        config: ConfigOption = None,
        json: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Train a grid of students, compare them, and name the smallest that will do and the rows it takes.

        Examples: sbs-edge study; sbs-edge study rows.jsonl --model google/flan-t5-small --student 8/8 --student 8/2
        """
        need(TRAINING, "train", "Training")
        need((*EXPORTING, "matplotlib"), "export", "sbs-edge study")
        from sbs_edge.pipelines.study.config import parse_config
        from sbs_edge.pipelines.study.study import Placement, plan_study, run_study
        from sbs_edge.training.config import TrainConfig

        own = {"model": model, "encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
        own = {name: value for name, value in own.items() if value is not None}
        flags = {"mode": "--method", "max_steps": "--steps", "epochs": "--steps", "seed": "--seed"}
        flags |= {name: f"--{name.replace('_', '-')}" for name in own}
        given: dict[str, Any] = {
            "seeds": seeds, "seed": seed, "steps": steps, "within": within, "target": target,
            "evaluation_rows": evaluation_rows, "labels": labels and labels.value, "students": tuple(student or ()),
            "training": {**own, **parse_fields(training or (), TrainConfig, flags)},
        }  # fmt: skip
        given |= {"methods": tuple(each.value for each in method)} if method else {}
        given |= {"shares": tuple(share)} if share else {}
        settings = parse_config(**given)
        if engine is StudyEngine.local and (ray_address is not None or worker_gpus):
            raise UsageError(
                "--ray-address and --worker-gpus belong to --engine ray; add it, or leave them out."
            )
        placement = Placement(engine.value, processes, threads, worker_gpus, ray_address)

        from sbs_edge.cli.run import load_data

        console = Console(stderr=True)
        splits = load_data(ctx.params, work, dry_run)
        if dry_run:
            plan = plan_study(splits, work, settings, placement, write=False)
            shown = {
                **resolved(ctx),
                "rows": {n: len(getattr(splits, n)) for n in ("train", "validation", "test")},
                "runs": [run.name for run in plan.runs],
                "finished": len(plan.finished),
                "at_once": plan.spread.processes,
                "threads_each": plan.spread.threads,
            }
            print_json(shown) if json else console.print(shown)
            return
        from sbs_edge.bench.core.machine import provenance
        from sbs_edge.pipelines.study.page import study_markdown, study_page, study_table

        work.mkdir(parents=True, exist_ok=True)
        began = provenance()
        save_resolved(ctx, work / "config.yaml")
        found = run_study(
            splits, work, settings, placement, out=out,
            say=lambda line: console.print(line, style="dim", markup=False, highlight=False),
        )  # fmt: skip
        document = {"format": 1, "kind": "study", **began, **found}
        files.write_json(work / "study.json", document)
        files.write_text(work / "study.md", study_markdown(document))
        files.write_text(work / "study.html", study_page(document))
        if json:
            print_json(document)
        else:
            Console().print(study_table(document))
            for sentence in document["sentences"]:
                Console().print(sentence, markup=False, highlight=False)
        console.print(
            f"Bundle: {document['bundle']}   report: {work / 'study.html'}   {document['seconds']:.0f} s",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
