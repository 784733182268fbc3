"""``sbs-edge task``: write and check task files for the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sbs_edge.cli._common import JsonOption, print_json
from sbs_edge.cli._data_options import ColumnOption, LeaveOutBadRowsOption, read_rows
from sbs_edge.cli._serve_teacher import register_serve
from sbs_edge.cli._try import register_try

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command group to ``app``."""
    group = typer.Typer(
        no_args_is_help=True, help="Write, check and try the file that describes a task to a teacher."
    )
    app.add_typer(group, name="task")

    @group.command()
    def new(
        source: Annotated[
            str,
            typer.Argument(
                help="A data file that shows the task, or a preset: cqa, svamp, anli1, esnli, hvac."
            ),
        ],
        out: Annotated[Path, typer.Option(help="The task file to write.")] = Path("task.yaml"),
        name: Annotated[
            str | None, typer.Option(help="Short name of the task. Default: the file's name.")
        ] = None,
        shots: Annotated[
            int,
            typer.Option(
                min=0, help="Worked examples to take from the data; each costs tokens in every call."
            ),
        ] = 3,
        column: ColumnOption = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
        json: JsonOption = False,
    ) -> None:
        """Write a task file from a data file or a preset; then edit it by hand.

        Examples: sbs-edge task new tickets.csv --column input=text; sbs-edge task new svamp
        """
        import re

        from sbs_edge.data.labels import fit_labels
        from sbs_edge.errors import UsageError
        from sbs_edge.teacher.new_task import task_from_examples
        from sbs_edge.teacher.presets import PRESETS
        from sbs_edge.teacher.task import TO_REPLACE, placeholders, save_task

        if out.exists() and not force:
            raise UsageError(f"{out} exists. Give another --out, or --force to replace it.")
        if source in PRESETS and not Path(source).exists():
            task = PRESETS[source]
        else:
            rows = read_rows(Path(source), column, skip_bad_rows)
            plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name or Path(source).stem).strip("-.") or "task"
            task = task_from_examples(plain, rows, shots)
            unlabelled = [row for row in rows if row.label is None]
            notes = [str(item) for item in fit_labels(rows, task.spec)[1]]
            if unlabelled:
                notes.append(
                    f"{len(unlabelled)} of {len(rows)} rows have no label, the first is {unlabelled[0].source}"
                )
            for note in notes:
                Console(stderr=True).print(f"{note}.", highlight=False, markup=False, soft_wrap=True)
        save_task(task, out)
        if json:
            print_json(task.model_dump(mode="json"))
        Console(stderr=True).print(
            f"Wrote {out}: {task.label_kind} labels, {len(task.shots)} worked examples."
            + (f" Now edit it: replace the texts that say {TO_REPLACE}." if placeholders(task) else ""),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    @group.command()
    def check(
        path: Annotated[str, typer.Argument(help="A task file, or the name of a preset.")],
        json: JsonOption = False,
    ) -> None:
        """Check a task file. Problems and unfinished texts are named with their field (exit code 2)."""
        from sbs_edge.teacher.presets import load_task
        from sbs_edge.teacher.task import refuse_placeholders

        task = load_task(path)
        refuse_placeholders(task, path)
        if json:
            print_json(task.model_dump(mode="json"))
        Console(stderr=True).print(
            f"{path} is valid: {task.label_kind} labels, {len(task.shots)} worked examples.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    register_try(group)
    register_serve(group)
