"""``sbs-edge export``: a student directory in, a sealed bundle out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sbs_edge.cli._common import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    need,
    print_json,
    resolved,
    save_resolved_beside,
)
from sbs_edge.cli._data_options import ColumnOption, LeaveOutBadRowsOption, read_rows
from sbs_edge.errors import UsageError
from sbs_edge.progress import heartbeat

__all__ = ["EXPORTING", "MaxDropOption", "MinRationaleAgreementOption", "register"]

EXPORTING = ("onnx", "onnxruntime", "torch", "transformers", "safetensors")

MaxDropOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=100,
        help="Points of accuracy that a lossy target may lose; more is exit 3 and keeps the old bundle.",
    ),
]
MinRationaleAgreementOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Share of steps in which a lossy target must write the float32 student's next token; below it exit 3.",
    ),
]


class Layout(StrEnum):
    """The layouts of the output directory."""

    bundle = "bundle"
    optimum = "optimum"
    triton = "triton"


def _long(
    long: bool | None,
    max_tokens: int | None,
    top_k: int | None,
    overlap: float | None,
    header: str | None,
    marker: bool,
) -> bool | dict[str, Any] | None:
    """Return the argument ``long`` of the function ``export``."""
    given = {
        "max_tokens": max_tokens, "top_k": top_k, "overlap": overlap, "header": header, "marker": marker or None,
    }  # fmt: skip
    fields = {name: value for name, value in given.items() if value is not None}
    if fields and long is False:
        raise UsageError(
            "--no-long leaves long inputs out; leave the options about them out too: --max-long-tokens, --top-k, "
            "--chunk-overlap, --chunk-header and --chunk-marker."
        )
    return fields or long


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def export(
        ctx: typer.Context,
        student: Annotated[Path, typer.Argument(help="The student directory that training wrote.")],
        out: Annotated[
            Path, typer.Option(help="The bundle's directory; replaced only by a complete bundle.")
        ],
        target: Annotated[
            list[str] | None,
            typer.Option(
                help="cpu-fp32, cpu-int8, cpu-int4, cuda-fp16, cuda-bf16, tensorrt-fp16 or tensorrt-int8; the first "
                "is the bundle's default. Default: cpu-int8."
            ),
        ] = None,
        guard_data: Annotated[
            Path | None,
            typer.Option(
                help="Labelled rows for the accuracy check. Default: the student's validation rows."
            ),
        ] = None,
        column: ColumnOption = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        max_drop: MaxDropOption = 1.0,
        min_rationale_agreement: MinRationaleAgreementOption = 0.9,
        calibration_rows: Annotated[
            int, typer.Option(min=1, help="Training rows that set the ranges of int8 activations.")
        ] = 256,
        abstain_below: Annotated[
            float,
            typer.Option(min=0, max=1, help="Probability below which predict marks an answer as uncertain."),
        ] = 0.0,
        beam: Annotated[
            list[int] | None,
            typer.Option(
                min=2,
                help="Add a graph with a beam search of this width, on CPU targets.",
            ),
        ] = None,
        name: Annotated[str | None, typer.Option(help="The bundle's name. Default: the task's.")] = None,
        label: Annotated[
            list[str] | None,
            typer.Option(
                help="A label of a checkpoint that was not trained here; give the option once for each label."
            ),
        ] = None,
        label_prefix: Annotated[
            str | None, typer.Option(help="Prefix of such a checkpoint's label task. Default: none.")
        ] = None,
        rationale_prefix: Annotated[
            str | None, typer.Option(help="Prefix of such a checkpoint's rationale task. Default: none.")
        ] = None,
        max_source_tokens: Annotated[
            int | None,
            typer.Option(
                min=2, help="Longest input in tokens (ByT5: bytes). Default: the student's own limit."
            ),
        ] = None,
        keep_float: Annotated[
            list[str] | None,
            typer.Option(
                help="A layer to keep in float32: larger, but more exact. A failed accuracy check names some."
            ),
        ] = None,
        prune_vocabulary: Annotated[
            bool,
            typer.Option(
                "--prune-vocabulary",
                help="Write rationales only with tokens of the student's rows and a margin: faster, accuracy is checked.",
            ),
        ] = False,
        prune_input_vocabulary: Annotated[
            bool,
            typer.Option(
                "--prune-input-vocabulary",
                help="Read only tokens of the student's rows, pieces that spell other texts, and a margin: smaller, "
                "accuracy is checked.",
            ),
        ] = False,
        label_only: Annotated[
            bool,
            typer.Option(
                "--label-only", help="Write no graph for rationales: labels work, explanations do not."
            ),
        ] = False,
        layout: Annotated[
            Layout,
            typer.Option(
                help="'optimum' and 'triton' are for other runtimes; predict and serve need 'bundle'."
            ),
        ] = Layout.bundle,
        single_file: Annotated[
            bool,
            typer.Option(
                "--single-file",
                help="Add a graph with the tokenizer inside, text in; for CPU targets, needs the extra 'single-file'.",
            ),
        ] = False,
        unguarded: Annotated[
            bool,
            typer.Option(
                "--unguarded",
                help="Also write targets that cannot run on this machine; their accuracy is not measured.",
            ),
        ] = False,
        long: Annotated[
            bool | None,
            typer.Option(
                "--long/--no-long",
                help="Read inputs over the limit in chunks (CPU targets). Default: only if the student was trained on them.",
            ),
        ] = None,
        max_long_tokens: Annotated[
            int | None, typer.Option(min=8, help="Longest input in tokens with --long. Default: 65536.")
        ] = None,
        top_k: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="States each head reads of a long input. Default: the student's own number, or all.",
            ),
        ] = None,
        chunk_overlap: Annotated[
            float | None,
            typer.Option(min=0, help="Share that neighbouring chunks have in common. Default: 0.25."),
        ] = None,
        chunk_header: Annotated[
            str | None,
            typer.Option(help="Repeat the text up to this string in every chunk. Default: repeat nothing."),
        ] = None,
        chunk_marker: Annotated[
            bool, typer.Option("--chunk-marker", help="Tell each chunk its place: 'part 3 of 9'.")
        ] = False,
        version: Annotated[str, typer.Option(help="The bundle's version, shown by the server.")] = "1",
        config: ConfigOption = None,
        json: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Export a student as a bundle: ONNX graphs for each target, checked against the float32 student.

        Example: sbs-edge export runs/latest/students/step-by-step --out bundle --target cpu-int8
        """
        need(EXPORTING, "export", "sbs-edge export")
        if single_file:
            need(("onnxruntime_extensions", "sentencepiece"), "single-file", "Embedding the tokenizer")
        from sbs_edge.export.checkpoint import open_student
        from sbs_edge.export.targets import targets_named

        console = Console(stderr=True)
        targets = tuple(target or ("cpu-int8",))
        targets_named(targets)
        rows = None
        if guard_data is not None:
            rows = read_rows(guard_data, column, skip_bad_rows)
            if not any(row.label or row.teacher_label for row in rows):
                raise UsageError(f"{guard_data} has no labelled row, so no accuracy can be measured on it.")
        if dry_run:
            opened = open_student(student, label, label_prefix, rationale_prefix, max_source_tokens)
            plan = {**resolved(ctx), "task": opened.task.name, "mode": opened.mode, "targets": list(targets)}
            print_json(plan) if json else console.print(plan)
            return
        from sbs_edge.export.api import export as export_student

        stage = [f"0 of {len(targets)} targets begun"]
        begun: set[str] = set()

        def say(line: str) -> None:
            begun.update(each for each in targets if line == f"writing graphs for {each}")
            stage[0] = f"{line} (target {max(len(begun), 1)} of {len(targets)})"
            console.print(line, style="dim", markup=False)

        with heartbeat("exporting", lambda: stage[0]):
            result = export_student(
                student, out, targets=targets, beams=tuple(beam or ()),
                guard_data=rows, max_drop=max_drop, min_rationale_agreement=min_rationale_agreement,
                calibration_rows=calibration_rows, abstain_below=abstain_below, name=name, labels=label,
                label_prefix=label_prefix, rationale_prefix=rationale_prefix, max_source_tokens=max_source_tokens,
                keep_float=tuple(keep_float or ()),
                prune_vocabulary=prune_vocabulary, prune_input_vocabulary=prune_input_vocabulary, label_only=label_only,
                layout=layout.value, single_file=single_file, unguarded=unguarded,
                long=_long(long, max_long_tokens, top_k, chunk_overlap, chunk_header, chunk_marker),
                version=version,
                say=say,
            )  # fmt: skip
        # Beside the bundle: what is in it is listed, and nothing else may be.
        save_resolved_beside(ctx, out)
        if json:
            print_json({"path": str(result.path), "manifest": result.manifest, "report": result.report})
            return
        table = Table(title=f"{result.manifest['name']} in {result.path}")
        headings = ("target", "MB", "accuracy", "drop, points (bound)", "same label", "same next token")
        for heading in headings:
            table.add_column(heading, justify="left" if heading == "target" else "right")
        for key, entry in result.manifest["targets"].items():
            size = sum(f["bytes"] for n, f in result.manifest["files"].items() if n.startswith(f"{key}/"))
            figures = entry["accuracy"]
            shown = (
                ("not measured",) * 4
                if figures is None
                else (
                    f"{100 * figures['after']:.2f} %",
                    f"{figures['drop_points']:.2f} ({figures['drop_bound']:.2f})",
                    f"{100 * figures['label_agreement']:.2f} %",
                    f"{100 * figures['rationale_next_token_agreement']:.2f} %"
                    if "rationale_next_token_agreement" in figures
                    else "no rationales",
                )
            )
            table.add_row(key, f"{size / 1e6:.2f}", *shown)
        Console().print(table)
