"""``sbs-edge bench serving``: the server under load over loopback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sbs_edge.cli._bench import OutOption, finish, progress, require
from sbs_edge.cli._common import ConfigOption, JsonOption
from sbs_edge.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``serving`` to the benchmark commands."""

    @app.command()
    def serving(
        ctx: typer.Context,
        scenario: Annotated[
            str,
            typer.Argument(
                help="latency, throughput, drain, cost, overload, soak, or all of these; or plain, which compares with a "
                "plain FastAPI server."
            ),
        ],
        bundle: Annotated[
            Path | None,
            typer.Argument(help="A bundle with a closed label set and rationales.", show_default=False),
        ] = None,
        shape: Annotated[
            str,
            typer.Option(
                help="Serve random weights instead of a bundle: t5-small, t5-v1_1-small, flan-t5-base or tiny.",
                show_default=False,
            ),
        ] = "",
        minutes: Annotated[
            float,
            typer.Option(min=0.001, help="Minutes of overload; the other timed parts are at most as long."),
        ] = 1.0,
        rounds: Annotated[
            int, typer.Option(min=1, help="Interleaved rounds of throughput, and of each case of plain.")
        ] = 5,
        requests: Annotated[int, typer.Option(min=1, help="Requests of the soak.")] = 100_000,
        soak_minutes: Annotated[
            float,
            typer.Option(
                min=0.01, help="Longest time for the soak; requests beyond it are reported as not sent."
            ),
        ] = 20.0,
        threads: Annotated[
            int, typer.Option(min=1, help="Threads per inference, in the server and in process.")
        ] = 1,
        pin: Annotated[
            bool,
            typer.Option(help="Run client and server on separate processors in overload, cost and plain."),
        ] = True,
        workers: Annotated[int, typer.Option(min=1, help="Processes of each server in plain.")] = 1,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Measure the server over loopback; exit 1 if a goal was missed.

        Scenarios given the same --out are gathered in one document. The last line of stdout is that
        document as JSON.

        Example: sbs-edge bench serving all runs/demo/bundle --out runs/bench/serving
        """
        from sbs_edge.bench.serving.bench import Options, Scenario, gathered, measure, shape_to_bundle

        if scenario not in list(Scenario):
            raise UsageError(f"SCENARIO is one of {', '.join(Scenario)}; found {scenario!r}.")
        if (bundle is None) == (not shape):
            raise UsageError("Give either a bundle or --shape.")
        if scenario == Scenario.plain:
            require("fastapi", "The plain server")
        if threads == 1:  # the same single thread for the tokenizer, here and in the server
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        options = Options(60 * minutes, requests, 60 * soak_minutes, threads, pin, workers, rounds)
        served = bundle or shape_to_bundle(shape, progress)
        earlier = gathered(out / "result.json", served) if out else None
        document = measure(Scenario(scenario), served, options, earlier, progress)
        finish(document, out, ctx, json)
        if not all(ok for part in document["scenarios"].values() for ok in part["held"].values()):
            raise typer.Exit(1)
