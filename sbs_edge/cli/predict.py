"""``sbs-edge predict``: texts in, JSON Lines out, a few hundred rows at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, either, save_resolved, save_resolved_beside
from sbs_edge.cli._data_options import ColumnOption
from sbs_edge.cli._predict_rows import PredictRow, columns_of, is_table, table_rows, text_rows
from sbs_edge.data.questions import answers_of
from sbs_edge.data.rows import is_text
from sbs_edge.errors import DataError, UsageError
from sbs_edge.progress import ProgressLine
from sbs_edge.runtime.answers import answer_document
from sbs_edge.runtime.texts import over_limit
from sbs_edge.tokens import most_characters

__all__ = ["register"]

ROWS_A_CALL = 256


class Engine(StrEnum):
    """The ways to run the students."""

    local = "local"
    ray = "ray"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def predict(
        ctx: typer.Context,
        bundle: Annotated[Path, typer.Argument(help="A bundle's directory.")],
        source: Annotated[
            str,
            typer.Argument(
                help="JSON Lines, JSON, CSV, TSV or Parquet, by suffix; otherwise one text per line; '-' is stdin. "
                "--input SOURCE is the same."
            ),
        ] = "-",
        out: Annotated[
            str | None,
            typer.Option(
                help="Write to this file instead of stdout, whole or not at all. --output is the same."
            ),
        ] = None,
        target: Annotated[str | None, typer.Option(help="Target of the bundle. Default: its first.")] = None,
        field: Annotated[
            str, typer.Option(help="Column that holds the text; short for --column input=FIELD.")
        ] = "input",
        column: ColumnOption = None,
        jsonl: Annotated[
            bool, typer.Option("--jsonl", help="Read stdin, or a file of any suffix, as JSON Lines.")
        ] = False,
        label: Annotated[
            list[str] | None,
            typer.Option(help="A label to choose from; give the option once for each."),
        ] = None,
        explain: Annotated[
            bool, typer.Option("--explain", help="Add the student's rationale; slower.")
        ] = False,
        abstain_below: Annotated[
            float | None,
            typer.Option(
                min=0, max=1, help="Mark answers below this probability. Default: the bundle's threshold."
            ),
        ] = None,
        truncate: Annotated[
            bool,
            typer.Option(
                "--truncate", help="Cut inputs that are over the limit and say so, instead of stopping."
            ),
        ] = False,
        threads: Annotated[
            int | None,
            typer.Option(
                min=1, help="Threads per call. Default: as many as the CPU quota and affinity allow."
            ),
        ] = None,
        engine: Annotated[
            Engine,
            typer.Option(
                help="local: this process. ray: Ray Data workers; SOURCE may be a pattern or URI, --out is a folder."
            ),
        ] = Engine.local,
        workers: Annotated[int, typer.Option(min=1, help="Ray: actors, each with a student.")] = 2,
        worker_cpus: Annotated[
            float | None,
            typer.Option(min=0, help="Ray: CPUs per actor, fractions allowed. Default: --threads."),
        ] = None,
        worker_gpus: Annotated[
            float, typer.Option(min=0, help="Ray: GPUs per actor, fractions allowed.")
        ] = 0.0,
        shard_mb: Annotated[
            float,
            typer.Option(min=0.001, help="Ray: megabytes of input per shard; a lost actor repeats one."),
        ] = 4.0,
        shard_format: Annotated[
            str, typer.Option(help="Ray: format of the shards, jsonl or parquet.")
        ] = "jsonl",
        ray_address: Annotated[
            str | None, typer.Option(help="Ray: address of a cluster. Default: start one on this machine.")
        ] = None,
        input: Annotated[str | None, typer.Option("--input", hidden=True, help="SOURCE.")] = None,
        output: Annotated[str | None, typer.Option("--output", hidden=True, help="--out.")] = None,
        config: ConfigOption = None,
    ) -> None:
        """Answer each row with a JSON object, in the order of the input.

        Examples: sbs-edge predict bundle rows.csv --column input=text; echo "no cold air" | sbs-edge predict bundle;
        sbs-edge predict bundle --engine ray --input 'rows/*.jsonl' --output scored
        """
        from sbs_edge.runtime.student import Student

        source = either(ctx, "source", "input", "SOURCE and --input")
        out = either(ctx, "out", "output", "--out and --output")
        columns = columns_of(column or (), field)
        if not all(map(is_text, label or ())):
            raise UsageError("A --label is not valid UTF-8; give labels as text.")
        if engine is Engine.ray:
            from sbs_edge.scale.predict import predict_with_ray

            if out is None or source == "-":
                raise UsageError(
                    "--engine ray reads files and writes a folder: give SOURCE (or --input) and --out (or --output)."
                )
            if columns.choices or columns.id:
                raise UsageError("--engine ray reads 'choices' and 'id' from columns of these names.")
            totals = predict_with_ray(
                bundle, source, out, target=target, field=columns.input or field, labels=label, explain=explain,
                truncate=truncate, abstain_below=abstain_below, threads=threads or 1, workers=workers,
                cpus_each=worker_cpus, gpus_each=worker_gpus, shard_bytes=int(shard_mb * 1e6),
                form=shard_format, ray_address=ray_address,
            )  # fmt: skip
            save_resolved_beside(ctx, out)
            sys.stdout.write(files.to_json(totals) + "\n")
            return
        messages = Console(stderr=True, markup=False)
        try:
            opened = nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb")  # noqa: SIM115
        except OSError as error:
            hint = " Name a file, or use --engine ray for a folder." if Path(source).is_dir() else ""
            raise UsageError(f"{source} cannot be read: {error.strerror}.{hint}") from error
        with opened as lines, Student.load(bundle, target=target, threads=threads) as student:
            entry = student.manifest["targets"][student.target]
            if entry.get("accuracy") is None:
                why = entry.get("unmeasured") or "it was exported without labelled rows"
                messages.print(f"{bundle}: the accuracy of {student.target} was never measured: {why}.")
            if source != "-" and not jsonl and is_table(source):
                rows = table_rows(source, columns, own_choices=not label)
            elif jsonl:
                rows = table_rows(source, columns, lines, own_choices=not label)
            else:
                rows = text_rows(lines, source)
            counted = source != "-" and (jsonl or not is_table(source) or Path(source).suffix == ".jsonl")
            line = ProgressLine("predicting", _lines_in(source) if counted else None)
            answers = _reported(_answers(student, rows, label, explain, abstain_below, truncate), line)
            if out is None:
                written = _write(answers, sys.stdout)
            else:
                with files.atomic_writer(out) as handle:
                    written = _write(answers, handle)
                save_resolved(ctx, Path(out).with_suffix(".config.yaml"))
            if not written:
                messages.print(
                    f"{'stdin' if source == '-' else source} has no rows, so there are no answers."
                )


def _lines_in(source: str) -> int:
    """Return how many lines a file has, at most one block of it in memory."""
    with open(source, "rb") as handle:
        return sum(block.count(b"\n") for block in iter(lambda: handle.read(1 << 20), b"")) or 1


def _reported(answers: Iterable[dict[str, Any]], line: ProgressLine) -> Iterator[dict[str, Any]]:
    """Pass the answers on and write how far they are, unless stderr is a terminal."""
    for done, answer in enumerate(answers, 1):
        yield answer
        if not sys.stderr.isatty():
            line.update(done)


def _answers(
    student: Any,
    rows: Iterator[PredictRow],
    labels: list[str] | None,
    explain: bool,
    abstain_below: float | None,
    truncate: bool,
) -> Iterator[dict[str, Any]]:
    while part := list(islice(rows, ROWS_A_CALL)):
        texts = [row.text for row in part]
        _refuse_long(student, part, truncate, explain)
        predictions = answers_of(
            student,
            texts,
            [row.labels for row in part],
            labels,
            truncate=truncate,
            abstain_below=abstain_below,
        )
        for row, prediction in zip(part, predictions, strict=True):
            if isinstance(prediction, UsageError):
                raise DataError(f"{row.place}: {prediction}") from prediction
        explanations = student.explain(texts, truncate=truncate) if explain else [None] * len(part)
        for row, prediction, explanation in zip(part, predictions, explanations, strict=True):
            yield {**row.rest, **answer_document(prediction, explanation)}


def _refuse_long(student: Any, part: list[PredictRow], truncate: bool, explain: bool) -> None:
    """Name file and line of an input over the limit; the runtime only knows its place in the call."""
    limit = student.max_input_tokens
    for task in () if truncate else ("label", "rationale") if explain else ("label",):
        for row, ids in zip(part, student.tokenize([row.text for row in part], task), strict=True):
            if len(ids) > limit or len(row.text) > most_characters(limit):
                raise DataError(over_limit(row.place, row.text, len(ids), limit, "--truncate", task))


def _write(answers: Iterable[dict[str, Any]], handle: IO[str]) -> int:
    """Write the answers; return their number."""
    number = 0
    for answer in answers:
        handle.write(files.to_json(answer) + "\n")
        handle.flush()
        number += 1
    return number
