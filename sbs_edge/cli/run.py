"""``sbs-edge run``: from examples to a bundle and a report, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Mode,
    ModeOption,
    SkipBadRowsOption,
    SliceOption,
    TaskOption,
    TeacherErrorOption,
    TeacherSamplesOption,
    TestOption,
    ValidationOption,
    judge,
    load_rows,
    read_rows,
)
from sbs_edge.cli._fields import parse_fields
from sbs_edge.cli.export import EXPORTING, MaxDropOption, MinRationaleAgreementOption
from sbs_edge.cli.train import TRAINING
from sbs_edge.errors import GuardError, UsageError
from sbs_edge.lock import held

if TYPE_CHECKING:
    from sbs_edge.data.example import Splits

__all__ = ["load_data", "register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def run(
        ctx: typer.Context,
        data: DataArgument = "builtin",
        out: Annotated[
            Path,
            typer.Option(
                help="Directory of the students, bundle and report; an old bundle is replaced at the end."
            ),
        ] = Path("runs/latest"),
        dataset: DatasetOption = None,
        validation: ValidationOption = None,
        test: TestOption = None,
        add: Annotated[
            list[Path] | None,
            typer.Option(
                help="Also train on these annotated rows. The new bundle replaces the one in use only if it is not worse "
                "on the test rows; otherwise the exit code is 3."
            ),
        ] = None,
        served: Annotated[
            Path | None, typer.Option(help="The bundle in use, with --add. Default: OUT/bundle.")
        ] = None,
        task: TaskOption = None,
        label_kind: LabelKindOption = None,
        compare: CompareOption = Compare.text,
        column: ColumnOption = None,
        mode: ModeOption = Mode.stepwise,
        steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each student.")] = 600,
        rationale_weight: Annotated[
            float | None,
            typer.Option(
                min=0,
                help="lambda in L_label + lambda * L_rationale. Default: 3 from scratch, 1 from a checkpoint.",
            ),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(
                help="T5-family checkpoint, by hub name or directory. Default: a tiny one from scratch."
            ),
        ] = None,
        encoder_layers: EncoderLayersOption = None,
        decoder_layers: DecoderLayersOption = None,
        controls: Annotated[
            bool,
            typer.Option(
                "--controls",
                help="Also train on shuffled rationales, and on labels alone for twice the steps.",
            ),
        ] = False,
        teacher_error: TeacherErrorOption = 0.0,
        teacher_samples: TeacherSamplesOption = 1,
        train_rows: Annotated[
            int | None, typer.Option(min=1, help="Use at most this many training rows.")
        ] = None,
        training: Annotated[
            list[str] | None,
            typer.Option(help="Set any option of train, for example d_model=128."),
        ] = None,
        target: Annotated[
            list[str] | None, typer.Option(help="Target to export. Default: cpu-int8 and cpu-fp32.")
        ] = None,
        max_drop: MaxDropOption = 1.0,
        min_rationale_agreement: MinRationaleAgreementOption = 0.9,
        slice: SliceOption = None,
        skip_bad_rows: SkipBadRowsOption = False,
        seed: Annotated[int, typer.Option(min=0, help="Seed of data, initial weights and row order.")] = 0,
        config: ConfigOption = None,
        json: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Train with and without rationales, compare, export, and write a report.

        Examples: sbs-edge run; sbs-edge run --controls; sbs-edge run DIR --dataset svamp --steps 2000;
        sbs-edge run rows.jsonl --add recorded.annotated.jsonl --mode stepwise-teacher
        """
        need(TRAINING, "train", "Training")
        need(EXPORTING, "export", "sbs-edge run")
        from sbs_edge.pipelines.replace import add_rows, check_served, refusal
        from sbs_edge.pipelines.run import RunConfig, arms_for
        from sbs_edge.pipelines.run import run as run_pipeline
        from sbs_edge.training.config import TrainConfig, make_config

        console = Console(stderr=True)
        flags = {"mode": "--mode", "max_steps": "--steps", "epochs": "--steps", "seed": "--seed"}
        own = {
            "rationale_weight": rationale_weight, "model": model or None, "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
        }  # fmt: skip
        own = {name: value for name, value in own.items() if value is not None}
        flags |= {name: f"--{name.replace('_', '-')}" for name in own}
        settings = RunConfig(
            mode=mode.value,
            steps=steps,
            controls=controls,
            targets=tuple(target or ("cpu-int8", "cpu-fp32")),
            seed=seed,
            max_drop=max_drop,
            min_rationale_agreement=min_rationale_agreement,
            slices=tuple(slice or ()),
            training={**own, **parse_fields(training or (), TrainConfig, flags)},
        )
        trained = make_config(
            None, {"mode": mode.value, "max_steps": steps, "seed": seed, **settings.training}
        )
        if served is not None and not add:
            raise UsageError(
                "--served names the bundle that a training with --add may replace. Give --add too."
            )
        in_use = (served or out / "bundle") if add else None
        if in_use is not None:
            check_served(in_use)
        splits = load_data(ctx.params, out, dry_run)
        added = None
        if add:
            rows = [row for path in add for row in read_rows(path, column, skip_bad_rows)]
            splits, added = add_rows(splits, rows, settings.mode)
            told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in added.items())
            console.print(f"--add: {told}", markup=False, highlight=False)
        warnings = judge(splits, mode.value)
        if dry_run:
            plan = {
                **resolved(ctx),
                "rows": {n: len(getattr(splits, n)) for n in ("train", "validation", "test")},
                "lambda": trained.lambda_,
                "students": [f"{arm.name}: mode {arm.mode}, {arm.steps} steps" for arm in arms_for(settings)],
            }
            print_json(plan) if json else console.print(plan)
            return
        out.mkdir(parents=True, exist_ok=True)
        try:
            with held(out, "run"):
                save_resolved(ctx, out / "config.yaml")
                report = run_pipeline(
                    splits, out, settings, served=in_use,
                    say=lambda line: console.print(line, style="dim", markup=False),
                )  # fmt: skip
        except GuardError as error:
            raise GuardError(f"{error} The trained students are kept in {out / 'students'}.") from error

        report["added"] = added
        report["warnings"] = [finding.message for finding in warnings]
        from sbs_edge.report.analysis import analysis_lines
        from sbs_edge.report.compare import comparison_headline
        from sbs_edge.report.run import headline, run_page, run_table

        files.write_json(out / "report.json", report)
        files.write_text(out / "report.html", run_page(report))
        if json:
            print_json(report)
        else:
            Console().print(run_table(report))
            replaced = report["replacement"] and comparison_headline(report["replacement"])
            for sentence in filter(None, (replaced, headline(report), report["linear"]["sentence"])):
                Console().print(sentence, markup=False, highlight=False)
            if report["analysis"]:
                for line in analysis_lines(report["analysis"])[1:]:
                    Console().print(line, markup=False, highlight=False)
        console.print(
            f"Bundle: {report['bundle']['path']}   report: {out / 'report.html'}   {report['seconds']:.0f} s",
            markup=False,
        )
        if report["replacement"] and not report["replacement"]["accepted"] and in_use is not None:
            raise GuardError(refusal(report["replacement"], in_use, out / "candidate"))


def load_data(values: dict[str, Any], out: Path, dry_run: bool) -> Splits:
    """Return the rows that the data options of a command ask for.

    Args:
        values: the command's parameters.
        out: directory for the list of malformed rows that were left out.
        dry_run: write nothing.

    """
    import dataclasses

    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.data.labels import fit_labels
    from sbs_edge.teacher.presets import load_task

    train_rows = values["train_rows"]
    if values["data"] == "builtin":
        size = {"n_train": train_rows} if train_rows else {}
        return builtin_splits(
            seed=values["seed"],
            teacher_error=values["teacher_error"],
            teacher_samples=values.get("teacher_samples", 1),
            **size,
        )
    if values["teacher_error"] or values.get("teacher_samples", 1) > 1:
        raise UsageError(
            f"teacher_error and teacher_samples are for the built-in task's own teacher; {values['data']} brings its "
            "teacher's answers. Leave them out."
        )
    spec = load_task(values["task"]).spec if values["task"] else None
    of_task = {"label_kind": spec.label_kind, "compare": spec.compare} if spec else {}
    skipped = None if dry_run else out / "skipped.jsonl"
    splits = load_rows(values, seed=values["seed"], skipped_file=skipped, **of_task)
    if spec:
        names = ("train", "validation", "test")
        parts: dict[str, Any] = {name: fit_labels(getattr(splits, name), spec)[0] for name in names}
        splits = dataclasses.replace(splits, task=spec, **parts)
    return dataclasses.replace(splits, train=splits.train[:train_rows]) if train_rows else splits
