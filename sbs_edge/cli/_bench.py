"""Options, checks and output that the benchmark commands share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from sbs_edge import files
from sbs_edge.cli._common import print_json, save_resolved
from sbs_edge.errors import MissingExtra, UsageError

__all__ = ["OutOption", "finish", "int_list", "names", "progress", "require"]


def _writable(out: Path | None) -> Path | None:
    """Raise an error before the measurement if the results cannot be written to ``out``."""
    if out is not None:
        files.check_writable(out.expanduser() / "result.json")
    return out


OutOption = Annotated[
    Path | None,
    typer.Option(
        callback=_writable,
        help="Directory for JSON, Markdown, pictures and a page. Default: the result is only on stdout.",
        show_default=False,
    ),
]


def int_list(text: str, flag: str, least: int = 1) -> tuple[int, ...]:
    """Parse whole numbers separated by commas.

    Raises:
        UsageError: the list is empty, a number is below ``least``, or a part is not a whole number.

    """
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{flag} takes whole numbers separated by commas; found {text!r}.") from error
    if not found or min(found) < least:
        raise UsageError(f"{flag} needs at least one number, none below {least}; found {text!r}.")
    return found


def names(text: str) -> tuple[str, ...]:
    """Split names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def progress(text: str) -> None:
    """Print a line of progress on stderr."""
    Console(stderr=True).print(text, highlight=False, markup=False, style="dim")


def require(package: str, purpose: str, extra: str = "bench") -> None:
    """Check that an optional package is installed.

    Raises:
        MissingExtra: it is not installed.

    """
    if find_spec(package) is None:
        raise MissingExtra(package, extra, purpose)


def _show(document: dict[str, Any], console: Console) -> None:
    from sbs_edge.bench.core.tables import headline
    from sbs_edge.bench.report.document import SMOKE, tables_of

    console.print(headline(document), style="bold")
    if document.get("quick"):
        console.print(SMOKE, style="bold red")
    for table in tables_of(document):
        drawn = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for index, name in enumerate(table.columns):
            drawn.add_column(name, justify="left" if index == 0 else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


def finish(document: dict[str, Any], out: Path | None, ctx: typer.Context, json_only: bool) -> None:
    """Show tables on stderr, write the report, and print the document as the last line of stdout."""
    console = Console(stderr=True)
    if not json_only:
        _show(document, console)
    if out is not None:
        from sbs_edge.bench.report.document import write_report

        for path in write_report(document, out):
            console.print(f"wrote {path}", highlight=False)
        save_resolved(ctx, out / "config.yaml")
    print_json(document)
