"""``sbs-edge bench latency``: bundles and their peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbs_edge.cli._bench import OutOption, finish, int_list, names, progress, require
from sbs_edge.cli._common import ConfigOption, JsonOption

__all__ = ["register"]

_ALL = "transformers,ctranslate2,optimum,openvino,onnxruntime-int8"
_QUICK_SOURCES = (16, 32)


def register(app: typer.Typer) -> None:
    """Add ``latency`` to the benchmark commands."""

    @app.command()
    def latency(
        ctx: typer.Context,
        bundles: Annotated[
            list[Path] | None,
            typer.Argument(help="Bundles to measure, unless --shape is given.", show_default=False),
        ] = None,
        student: Annotated[
            Path | None,
            typer.Option(help="The student that they were exported from. Default: found next to the bundle."),
        ] = None,
        shape: Annotated[
            str | None,
            typer.Option(
                help="Measure random weights instead: t5-small, t5-v1_1-small, flan-t5-base or tiny."
            ),
        ] = None,
        encoder_layers: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="Encoder layers of --shape in place of its own; its full depth is measured beside.",
            ),
        ] = None,
        decoder_layers: Annotated[
            int | None, typer.Option(min=1, help="Decoder layers of --shape in place of its own.")
        ] = None,
        against: Annotated[
            str, typer.Option(help="Peers, separated by commas; a missing one gets a row with the reason.")
        ] = _ALL,
        target: Annotated[
            str, typer.Option(help="Targets of each bundle, separated by commas. Default: its first.")
        ] = "",
        threads: Annotated[int, typer.Option(min=1, help="Compute threads of every system.")] = 1,
        cpus: Annotated[
            str, typer.Option(help="Processors to pin the systems to. Default: the last ones allowed.")
        ] = "",
        rounds: Annotated[int, typer.Option(min=1, help="Most interleaved rounds.")] = 10,
        minutes: Annotated[
            float, typer.Option(min=0.01, help="Time for all timed parts; at least 3 rounds are run.")
        ] = 4.0,
        sources: Annotated[str, typer.Option(help="Source lengths in tokens.")] = "16,64,256",
        batches: Annotated[str, typer.Option(help="Batch sizes of the label task.")] = "1,8",
        rationale_batches: Annotated[str, typer.Option(help="Batch sizes of the rationale task.")] = "1",
        rows: Annotated[int, typer.Option(min=8, help="Validation rows that accuracy is measured on.")] = 96,
        seed: Annotated[int, typer.Option(min=0, help="Seed of inputs, arrivals and random weights.")] = 0,
        quick: Annotated[
            bool,
            typer.Option("--quick", help="Smoke test: two rounds, short inputs; the figures mean nothing."),
        ] = False,
        prepare_only: Annotated[
            bool, typer.Option("--prepare-only", help="Convert, load and check the answers, without timing.")
        ] = False,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Measure the latency of bundles and peers on the same weights, inputs and threads.

        Label and rationale latency, throughput, latency under load, cold start, memory, disk and
        installed size; every speed is shown with its accuracy. The last line of stdout is a JSON document.

        Examples: sbs-edge bench latency runs/demo/bundle --out runs/bench; sbs-edge bench latency --shape t5-small
        --decoder-layers 2
        """
        require("tokenizers", "The latency bench")
        from sbs_edge.bench.latency.bench import LatencyOptions, measure_latency
        from sbs_edge.bench.latency.sections import Schedule

        schedule = Schedule(
            rounds=rounds,
            least_rounds=min(3, rounds),
            seconds=60 * minutes,
            sources=int_list(sources, "--sources"),
            batches=int_list(batches, "--batches"),
            rationale_batches=int_list(rationale_batches, "--rationale-batches"),
        )
        if quick:
            schedule = Schedule(
                rounds=2, least_rounds=2, seconds=5, call_seconds=0.01, sources=_QUICK_SOURCES,
                batches=(1, 8), rationale_steps=8, stream=16, load_seconds=0.3, cold_rounds=1,
            )  # fmt: skip
            rows = min(rows, 24)
        options = LatencyOptions(
            bundles=tuple(bundles or ()),
            student=student,
            shape=shape,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            against=names(against),
            targets=names(target),
            threads=threads,
            cpus=int_list(cpus, "--cpus", least=0) if cpus else (),
            rows=rows,
            seed=seed,
            prepare_only=prepare_only,
            schedule=schedule,
        )
        document = measure_latency(options, progress)
        document["quick"] = quick
        finish(document, out, ctx, json)
