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
    Mode,
    ModeOption,
    SkipBadRowsOption,
    TestOption,
    ValidationOption,
    judge,
)
from sbs_edge.errors import MissingExtra

if TYPE_CHECKING:
    from sbs_edge.data.example import Splits

__all__ = ["register"]


class Prefixes(StrEnum):
    """Presets of the two task prefixes."""

    seed = "seed"
    authors = "authors"


class RowWeight(StrEnum):
    """What weights a row's tokens."""

    none = "none"
    confidence = "confidence"


# flags that are not fields of the training configuration
_SOURCE = (
    "data",
    "dataset",
    "validation",
    "test",
    "label_kind",
    "compare",
    "column",
    "skip_bad_rows",
    "stream",
)


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


def _load(values: dict[str, Any], out: Path, seed: int) -> tuple[Splits, Any]:
    from sbs_edge.data.load import load_splits
    from sbs_edge.data.readers import ColumnMap

    columns = ColumnMap.parse(values["column"] or ())
    if values["stream"]:
        from sbs_edge.training.stream import open_stream

        return open_stream(
            values["data"],
            validation=values["validation"],
            columns=columns,
            label_kind=values["label_kind"],
            compare=values["compare"],
            skip_bad_rows=values["skip_bad_rows"],
        )
    return (
        load_splits(
            values["data"],
            dataset=values["dataset"],
            validation=values["validation"],
            test=values["test"],
            label_kind=values["label_kind"],
            compare=values["compare"],
            columns=columns,
            skip_bad_rows=values["skip_bad_rows"],
            seed=seed,
            skipped_file=None if values["dry_run"] else out.with_name(out.name + ".skipped.jsonl"),
        ),
        None,
    )


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def train(
        ctx: typer.Context,
        data: DataArgument = "builtin",
        out: Annotated[
            Path, typer.Option(help="The student's directory; checkpoints go to OUT.training beside it.")
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
                "--stream", help="Never hold the training rows; needs --validation and --max-steps."
            ),
        ] = False,
        mode: ModeOption = Mode.stepwise,
        rationale_weight: Annotated[
            float | None,
            typer.Option(
                min=0,
                help="lambda in L_label + lambda * L_rationale; none: 3 from scratch, 1 from a checkpoint.",
            ),
        ] = None,
        alpha: Annotated[
            float | None,
            typer.Option(
                min=0,
                max=1,
                help="alpha in alpha * L_label + (1 - alpha) * L_rationale; lambda = (1 - alpha) / alpha.",
            ),
        ] = None,
        prefixes: Annotated[
            Prefixes,
            typer.Option(help="'[label] ' and '[rationale] ', or the authors' 'predict: ' and 'explain: '."),
        ] = Prefixes.seed,
        label_prefix: Annotated[str | None, typer.Option(help="Instead of the preset's.")] = None,
        rationale_prefix: Annotated[str | None, typer.Option(help="Instead of the preset's.")] = None,
        model: Annotated[
            str | None,
            typer.Option(
                help="T5-family checkpoint, by hub name or directory; none: a small one from scratch."
            ),
        ] = None,
        d_model: Annotated[int, typer.Option(min=8, help="Width of a student from scratch.")] = 64,
        d_ff: Annotated[int, typer.Option(min=8, help="Feed-forward width from scratch.")] = 512,
        n_heads: Annotated[int, typer.Option(min=1, help="Attention heads from scratch.")] = 4,
        n_layers: Annotated[int, typer.Option(min=1, help="Encoder layers from scratch.")] = 2,
        n_decoder_layers: Annotated[int, typer.Option(min=1, help="Decoder layers from scratch.")] = 2,
        learning_rate: Annotated[
            float | None, typer.Option(min=0, help="Peak; none: 3e-3 from scratch, 1e-4 from a checkpoint.")
        ] = None,
        batch_size: Annotated[
            int, typer.Option(min=1, help="Examples a process sees in one forward pass.")
        ] = 32,
        gradient_accumulation: Annotated[
            int, typer.Option(min=1, help="Forward passes a step; means are taken over all of them.")
        ] = 1,
        gradient_checkpointing: Annotated[
            bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third slower.")
        ] = False,
        max_steps: Annotated[
            int | None, typer.Option(min=1, help="Optimiser steps; none and no --epochs: 600.")
        ] = None,
        epochs: Annotated[
            float | None, typer.Option(min=0, help="Passes over the rows, instead of --max-steps.")
        ] = None,
        max_source_tokens: Annotated[
            int, typer.Option(min=2, help="Longer inputs are cut, and counted.")
        ] = 512,
        max_target_tokens: Annotated[
            int, typer.Option(min=2, help="Longer targets are cut, and counted.")
        ] = 256,
        row_weight: Annotated[
            RowWeight, typer.Option(help="Weight rows by their confidence, or all alike.")
        ] = RowWeight.none,
        eval_steps: Annotated[
            int | None, typer.Option(min=1, help="Steps between evaluations; none: six a run.")
        ] = None,
        save_steps: Annotated[
            int | None,
            typer.Option(min=0, help="Steps between checkpoints; none: at evaluations; 0: no checkpoints."),
        ] = None,
        early_stopping_patience: Annotated[
            int | None,
            typer.Option(min=1, help="Stop after so many evaluations without a better validation score."),
        ] = None,
        lora_rank: Annotated[
            int, typer.Option(min=0, help="Train LoRA adapters of this rank; merged at the end.")
        ] = 0,
        bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
        fsdp: Annotated[
            bool, typer.Option("--fsdp", help="Shard parameters over torchrun's processes.")
        ] = False,
        resume: Annotated[
            bool,
            typer.Option(
                "--resume", help="Continue from the newest checkpoint; without it a run starts anew."
            ),
        ] = False,
        seed: Annotated[int, typer.Option(min=0, help="Seed of splits, initial weights and row order.")] = 0,
        config: ConfigOption = None,
        json_output: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Train a student on labels and rationales; validation rows choose its weights.

        Examples: sbs-edge train; sbs-edge train rows.jsonl --model google/flan-t5-small --max-steps 2000
        """
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            raise MissingExtra(error.name or "torch", "train", "Training") from error
        from sbs_edge.training.config import make_config

        values = dict(ctx.params)
        overrides = {
            name: value.value if isinstance(value, StrEnum) else value
            for name, value in values.items()
            if name not in (*_SOURCE, "out", "config", "json_output", "dry_run") and value is not None
        }
        settings = make_config(None, overrides)
        splits, rows = _load(values, out, seed)
        judge(splits, mode.value)
        if dry_run:
            counts = {name: len(getattr(splits, name)) for name in ("train", "validation", "test")}
            plan = {
                **resolved(ctx),
                "rows": counts,
                "lambda": settings.lambda_,
                "task": splits.task.label_kind,
            }
            print_json(plan) if json_output else Console(stderr=True).print(plan)
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
                f"{values['data']}: {rows.left_out} malformed row(s) left out of a pass; the first: {rows.first}",
                highlight=False,
                markup=False,
            )
        files.write_json(out / "metrics.json", report)
        print_json(report) if json_output else _show(result.metrics, result.seconds, out)
