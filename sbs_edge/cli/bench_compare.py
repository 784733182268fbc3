"""``sbs-edge bench compare``: two results of the same benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable

from sbs_edge.cli._common import JsonOption, print_json

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``compare`` to the benchmark commands."""

    @app.command()
    def compare(
        first: Annotated[Path, typer.Argument(help="The older result (result.json of --out).")],
        second: Annotated[Path, typer.Argument(help="The newer result.")],
        tolerance: Annotated[
            float,
            typer.Option(min=0, help="Share by which a figure may become worse before the exit code is 1."),
        ] = 0.15,
        system: Annotated[
            str, typer.Option(help="Compare systems whose name starts with this; '' compares the peers too.")
        ] = "sbs-edge",
        json: JsonOption = False,
    ) -> None:
        """Show which figures became worse from FIRST to SECOND, with noise bounds; exit 1 if any did.

        Example: sbs-edge bench compare bench/results/old.json runs/bench/result.json --tolerance 0.1
        """
        from sbs_edge.bench.core.compare import compare as changes_of
        from sbs_edge.bench.core.compare import conditions
        from sbs_edge.bench.core.results import load_document

        old, new = load_document(first), load_document(second)
        changes = changes_of(old, new, tolerance, system or None)
        notes = conditions(old, new)
        worse = [change for change in changes if change.verdict == "worse"]
        console = Console(stderr=True)
        for note in notes:
            console.print(f"differs: {note}", highlight=False, markup=False)
        if json:
            print_json(
                {"worse": len(worse), "conditions": notes, "changes": [item.as_dict() for item in changes]}
            )
        else:
            drawn = RichTable(title=f"{len(worse)} of {len(changes)} figures became worse")
            for name in ("figure", "system", "before", "after", "change", "95 % interval", "verdict"):
                drawn.add_column(name)
            order = {"worse": 0, "better": 1, "within noise": 2, "within tolerance": 3}
            for item in sorted(changes, key=lambda change: (order[change.verdict], -change.change)):
                figure = " ".join(part for part in (item.section, item.variant, item.case) if part)
                drawn.add_row(
                    figure, item.system, f"{item.before:.4g} {item.unit}", f"{item.after:.4g} {item.unit}",
                    f"{item.change:.2f}x", f"{item.low:.2f} to {item.high:.2f}", item.verdict,
                )  # fmt: skip
            Console().print(drawn)
        if worse:
            raise typer.Exit(1)
