"""``sbs-edge task try``: a few rows through the teacher before the whole set is paid for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sbs_edge.cli._annotate import (
    Connection,
    ask_teacher,
    connection_of,
    read_rows,
)
from sbs_edge.cli._common import JsonOption, print_json
from sbs_edge.cli._data_options import ColumnOption, LeaveOutBadRowsOption
from sbs_edge.cli._teacher_options import (
    ApiKeyEnvOption,
    BaseUrlOption,
    ExtraBodyOption,
    HeaderOption,
    MaxTokensOption,
    OmitOption,
    PriceInOption,
    PriceOutOption,
    RationaleFromOption,
    RequestOption,
    ServerOption,
    StructuredOption,
    TimeoutOption,
    with_rationale_from,
)

__all__ = ["register_try"]


def register_try(group: typer.Typer) -> None:
    """Add ``try`` to the group ``task``."""

    @group.command("try")
    def try_task(
        data: Annotated[str, typer.Argument(metavar="INPUT", help="Rows, as for annotate.")],
        task: Annotated[str, typer.Option(help="Task file or preset.")],
        model: Annotated[str, typer.Option(help="The teacher's model, as the server knows it.")],
        rows: Annotated[int, typer.Option(min=1, help="Number of rows to ask for.")] = 5,
        base_url: BaseUrlOption = None,
        server: ServerOption = None,
        api_key_env: ApiKeyEnvOption = None,
        header: HeaderOption = None,
        request: RequestOption = None,
        omit: OmitOption = None,
        extra_body: ExtraBodyOption = None,
        structured: StructuredOption = None,
        rationale_from: RationaleFromOption = None,
        temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
        max_tokens: MaxTokensOption = None,
        timeout: TimeoutOption = 120.0,
        column: ColumnOption = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        price_in: PriceInOption = 0.0,
        price_out: PriceOutOption = 0.0,
        journal: Annotated[
            Path | None,
            typer.Option(
                help="Keep the answers in this file; annotate with the same journal does not pay for them again."
            ),
        ] = None,
        json: JsonOption = False,
    ) -> None:
        """Ask a teacher for a few rows; show prompt, raw answer, label and rationale, tokens, cost, and what to change.

        Example: sbs-edge task try rows.jsonl --task task.yaml --base-url http://localhost:8080/v1 --model any
        """
        from sbs_edge.errors import SbsEdgeError, UsageError
        from sbs_edge.teacher.annotate import Settings
        from sbs_edge.teacher.calls import Sampling
        from sbs_edge.teacher.cost import Prices
        from sbs_edge.teacher.presets import load_task
        from sbs_edge.teacher.task import refuse_placeholders
        from sbs_edge.teacher.trial import trial_report, trial_text

        console = Console(stderr=True, markup=False)
        spec = with_rationale_from(load_task(task), rationale_from)
        refuse_placeholders(spec, task)
        sampling, connection = connection_of(
            spec,
            Sampling(temperature, max_tokens or spec.max_tokens),
            Connection(base_url=base_url, api_key_env=api_key_env, timeout=timeout),
            server=server,
            header=header or (),
            request=request or (),
            omit=omit or (),
            extra_body=extra_body,
            structured=structured,
        )
        prices = Prices(price_in, price_out)
        settings = Settings(
            model, sampling, prices=prices, max_attempts=2, retry_failed=True, server=connection.identity()
        )
        examples = read_rows(data, None, "train", column or [], rows, skip_bad_rows, console)
        if not examples:
            raise UsageError(f"{data} holds no row to ask for.")
        with tempfile.TemporaryDirectory() as folder:
            place = journal or Path(folder) / "journal.jsonl"
            annotation = ask_teacher(examples, spec, settings, connection, place, console)
        report = trial_report(examples, spec, annotation, model, prices)
        if json:
            print_json(report)
        else:
            typer.echo(trial_text(report))
        if report["usable"] == 0:
            raise SbsEdgeError(
                f"None of the {len(examples)} answers can be used. {' '.join(report['change'])}"
            )
