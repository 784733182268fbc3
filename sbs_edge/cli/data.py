"""``sbs-edge data check``: what a source of examples holds, before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, JsonOption, print_json
from sbs_edge.cli._data_options import (
    ColumnOption,
    Compare,
    CompareOption,
    DataArgument,
    DatasetOption,
    LabelKindOption,
    Mode,
    TestOption,
    ValidationOption,
)

__all__ = ["register"]

SHOWN = 5


def _length(lengths: dict[str, float] | None) -> str:
    return "-" if lengths is None else f"{lengths['mean']} / {lengths['p99']:.0f} / {lengths['max']:.0f}"


def _labels(labels: dict[str, Any], rows: int) -> str:
    if not rows:
        return "-"
    if labels["distinct"] > 8:
        return f"{labels['distinct']} different"
    return ", ".join(f"{label} {count}" for label, count in labels["most_common"].items())


def _agreement(split: dict[str, Any]) -> str:
    if not split["teacher_labels"] and not split["teacher_unparsed"]:
        return "no teacher"
    if not split["gold_labels"]:
        return "no gold"
    return f"{split['agreement']['equal']} of {split['agreement']['rows']}"


def _show(report: dict[str, Any]) -> None:
    console = Console()
    task = report["task"]
    title = (
        f"{report['source']}: task {task['name']}, labels {task['label_kind']}, compared by {task['compare']}"
    )
    rows = Table(title=escape(title))
    lengths = Table(
        title=f"Lengths in tokens, mean / 99th percentile / longest, counted as {escape(report['tokenizer'])}"
    )
    rows.add_column("split", no_wrap=True)
    lengths.add_column("split", no_wrap=True)
    for name in ("rows", "rejected", "unparsed", "teacher = gold"):
        rows.add_column(name, justify="right", no_wrap=True)
    rows.add_column("labels")
    for name in ("input", "label", "rationale"):
        lengths.add_column(name, justify="right", no_wrap=True)
    for split in report["splits"]:
        rows.add_row(
            split["name"],
            str(split["rows"]),
            str(sum(split["rejected"].values())),
            str(split["teacher_unparsed"]),
            _agreement(split),
            escape(_labels(split["labels"], split["rows"])),
        )
        lengths.add_row(
            split["name"], *(_length(split["tokens"][part]) for part in ("input", "label", "rationale"))
        )
    console.print(rows)
    console.print(lengths)

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for split in report["splits"]:
        for reason, count in split["rejected"].items():
            line(f"{split['name']}: {count} rejected: {reason}")
        for row in split["rejected_rows"]:
            line(f"  {row}")
        if split["teacher_outside_labels"]:
            line(
                f"{split['name']}: {split['teacher_outside_labels']} teacher labels are none of the row's possible labels"
            )
        if split["repeated_inputs"]:
            line(f"{split['name']}: {split['repeated_inputs']} rows repeat another row's input")
    if (drawn := report["drawn"]) is not None and "splits" in drawn:
        line(f"Training would draw these splits (--seed {drawn['seed']}):")
        for name, part in drawn["splits"].items():
            labels = ", ".join(f"{label} {count}" for label, count in part["labels"].items())
            line(f"  {name}: {part['rows']} rows; {labels}")
    elif drawn is not None:
        line(f"Training could not draw its splits: {drawn['problem']}")
    overlaps = report["overlaps"]
    line(f"Overlaps between splits: {overlaps['count']}")
    for row in overlaps["rows"]:
        line(f"  {row}")
    for finding in report["findings"]:
        line(f"{finding['level']}: {finding['message']} [{finding['code']}]")
        pairs = zip(finding["rows"], finding["others"] or [None] * len(finding["rows"]), strict=True)
        for row, other in list(pairs)[:SHOWN]:
            line(f"  {row}" if other is None else f"  {row} and {other}")
        if (more := len(finding["rows"]) - SHOWN) > 0:
            line(f"  and at least {more} more")
    line(f"Verdict: {report['verdict']}.")
    if report["problems"]:
        line(
            "Map columns of other names with --column, correct the rows, or leave them out with --skip-bad-rows."
        )


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    data = typer.Typer(no_args_is_help=True, help="Check examples before training on them.")
    app.add_typer(data, name="data")

    @data.callback()
    def _group() -> None:
        """Check examples before training on them."""

    @data.command()
    def check(
        ctx: typer.Context,
        path: DataArgument = "builtin",
        dataset: DatasetOption = None,
        validation: ValidationOption = None,
        test: TestOption = None,
        column: ColumnOption = None,
        label_kind: LabelKindOption = None,
        compare: CompareOption = Compare.text,
        mode: Annotated[
            Mode | None, typer.Option(help="Check the rows for this training mode. Default: for any.")
        ] = None,
        tokenizer: Annotated[
            Path | None,
            typer.Option(help="Directory with a tokenizer.json that counts tokens. Default: words."),
        ] = None,
        page: Annotated[
            Path | None,
            typer.Option(help="Write the findings, and samples to read, the worst first, to this HTML page."),
        ] = None,
        strict: Annotated[
            bool, typer.Option("--strict", help="Exit with 2 also if the verdict is warn.")
        ] = False,
        seed: Annotated[int, typer.Option(min=0, help="Seed of the splits that training would draw.")] = 0,
        config: ConfigOption = None,
        json: JsonOption = False,
    ) -> None:
        """Check examples before training: bad rows, labels, rationales, misplaced outputs, overlaps.

        The verdict is ok, warn or stop. On stop, training would refuse the rows, and the exit code is 2. Only --page
        writes a file.

        Examples: sbs-edge data check rows.jsonl --column input=question; sbs-edge data check DIR --page check.html
        """
        from sbs_edge.data.check import check_dataset
        from sbs_edge.data.readers import ColumnMap
        from sbs_edge.report.data_check import check_page

        if page is not None:
            files.check_writable(page)
        report = check_dataset(
            path,
            dataset=dataset.value if dataset else None,
            validation=validation,
            test=test,
            label_kind=label_kind.value if label_kind else None,
            compare=compare.value,
            columns=ColumnMap.parse(column or ()),
            tokenizer=tokenizer,
            mode=mode.value if mode else None,
            seed=seed,
        )
        if page is not None:
            files.write_text(page, check_page(report))
        if json:
            print_json(report)
        else:
            _show(report)
            if page is not None:
                Console().print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)
        if not report["ok"] or (strict and report["verdict"] != "ok"):
            raise typer.Exit(2)
