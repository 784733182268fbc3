"""``sbs-edge train``: examples with rationales in, a student directory out."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    LabelKindOption,
    SkipBadRowsOption,
    TestOption,
    ValidationOption,
    judge,
    load_rows,
)
from sbs_edge.cli._fields import field_options
from sbs_edge.training.config import TrainConfig, make_config

if TYPE_CHECKING:
    from sbs_edge.data.example import Splits

__all__ = ["TRAINING", "register"]

# Training imports each of them sooner or later; a missing one is named before any work.
TRAINING = ("torch", "transformers", "accelerate", "safetensors")


def _show(metrics: dict[str, Any], seconds: float, out: Path) -> None:
    table = Table("figure", "value", title=escape(f"Student in {out}"))
    agreement = metrics["teacher_agreement"]
    table.add_row("mode", metrics["mode"])
    table.add_row(
        "teacher's label = gold label",
        f"{agreement['equal']} of {agreement['total']} training rows"
        if agreement["total"]
        else "no row has both",
    )
    table.add_row("lambda", f"{metrics['rationale_weight']:g}")
    table.add_row("parameters", f"{metrics['parameters']:,}")
    layers = metrics["layers"]
    table.add_row("layers", f"{layers['encoder']} encoder, {layers['decoder']} decoder")
    table.add_row("steps (best on validation)", f"{metrics['steps']} ({metrics['best_step']})")
    for name in ("label", "rationale"):
        if f"{name}_loss" in metrics:
            table.add_row(f"{name} loss, training", f"{metrics[f'{name}_loss']:.4f}")
        if f"eval_{name}_loss" in metrics:
            table.add_row(f"{name} loss, validation", f"{metrics[f'eval_{name}_loss']:.4f}")
    if "eval_label_accuracy" in metrics:
        table.add_row("label accuracy, validation", f"{metrics['eval_label_accuracy']:.1%}")
    if metrics["cut_inputs"] or metrics["cut_targets"]:
        table.add_row(
            "cut to the limits", f"{metrics['cut_inputs']} inputs, {metrics['cut_targets']} targets"
        )
    table.add_row("seconds", f"{seconds:.1f}")
    Console().print(table)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, StrEnum) else value


def _load(values: dict[str, Any], out: Path, seed: int) -> tuple[Splits, Any]:
    if values["stream"]:
        from sbs_edge.data.readers import ColumnMap
        from sbs_edge.training.stream import open_stream

        return open_stream(
            values["data"],
            validation=values["validation"],
            columns=ColumnMap.parse(values["column"] or ()),
            label_kind=values["label_kind"],
            compare=values["compare"],
            skip_bad_rows=values["skip_bad_rows"],
        )
    skipped = None if values["dry_run"] else out.with_name(out.name + ".skipped.jsonl")
    return load_rows(values, seed=seed, skipped_file=skipped), None


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    @field_options(TrainConfig, before="config")
    def train(
        ctx: typer.Context,
        data: DataArgument = "builtin",
        out: Annotated[
            Path,
            typer.Option(help="The student directory to write; checkpoints are in OUT.training beside it."),
        ] = Path("runs/student"),
        dataset: DatasetOption = None,
        validation: ValidationOption = None,
        test: TestOption = None,
        label_kind: LabelKindOption = None,
        compare: CompareOption = Compare.text,
        column: ColumnOption = None,
        skip_bad_rows: SkipBadRowsOption = False,
        stream: Annotated[
            bool,
            typer.Option(
                "--stream", help="Read training rows as they are used; needs --validation and --max-steps."
            ),
        ] = False,
        config: ConfigOption = None,
        json: JsonOption = False,
        dry_run: DryRunOption = False,
        **fields: Any,
    ) -> None:
        """Train a student on labels and rationales; validation rows choose the weights.

        Examples: sbs-edge train; sbs-edge train rows.jsonl --model google/flan-t5-small --decoder-layers 2
        """
        need(TRAINING, "train", "Training")

        settings = make_config(
            None, {name: _plain(value) for name, value in fields.items() if value is not None}
        )
        splits, rows = _load(ctx.params, out, settings.seed)
        judge(splits, settings.mode)
        if dry_run:
            counts = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
            plan = {
                **resolved(ctx),
                "rows": counts,
                "lambda": settings.lambda_,
                "task": splits.task.label_kind,
            }
            print_json(plan) if json else Console(stderr=True).print(plan)
            return
        from sbs_edge.training.train import train as run_training

        result = run_training(splits, out, settings, stream=rows)
        if int(os.environ.get("RANK", "0")):
            return
        save_resolved(ctx, out / "config.yaml")
        report = {
            "student_dir": str(result.student_dir),
            "seconds": round(result.seconds, 1),
            **result.metrics,
        }
        if rows is not None and rows.left_out:
            report["malformed_rows_left_out"] = rows.left_out
            Console(stderr=True).print(
                f"{data}: {rows.left_out} malformed row(s) left out of a pass; the first: {rows.first}",
                highlight=False,
                markup=False,
            )
        files.write_json(out / "metrics.json", report)
        print_json(report) if json else _show(result.metrics, result.seconds, out)
