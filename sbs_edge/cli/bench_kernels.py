"""``sbs-edge bench kernels``: the fused loss and its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbs_edge.cli._bench import OutOption, finish, names, progress, require
from sbs_edge.cli._common import ConfigOption, JsonOption
from sbs_edge.errors import UsageError
from sbs_edge.resources import usable_cpus

__all__ = ["register"]

_QUICK_SHAPE = (64, 16, 300)


def _device(wanted: str) -> str:
    if wanted not in ("cpu", "cuda", "auto"):
        raise UsageError(f"--device takes cpu, cuda or auto; found {wanted!r}.")
    if wanted == "cpu":
        return wanted
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here that torch can use. Use --device cpu.")
    return wanted


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) / 100.0 for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"--padding takes percentages separated by commas; found {text!r}.") from error


def register(app: typer.Typer) -> None:
    """Add ``kernels`` to the benchmark commands."""

    @app.command()
    def kernels(
        ctx: typer.Context,
        shapes: Annotated[
            str,
            typer.Option(
                help="N,D,V[,N,D,V...]: rows, width, classes. Default: depends on the device.",
                show_default=False,
            ),
        ] = "",
        dtype: Annotated[
            str,
            typer.Option(
                help="float32, bfloat16, float16, separated by commas; amp-bfloat16 and amp-float16 use autocast with "
                "a float32 weight. Default: float32 on a CPU, otherwise bfloat16."
            ),
        ] = "",
        padding: Annotated[
            str,
            typer.Option(help="Per cent of rows to ignore; each loss then also gets the batch without them."),
        ] = "0",
        data: Annotated[
            str, typer.Option(help="random, flat, peaked, student, separated by commas.")
        ] = "random",
        student: Annotated[
            Path | None, typer.Option(help="Student directory for --data student.", show_default=False)
        ] = None,
        peers: Annotated[
            str,
            typer.Option(
                help="Losses to compare with, separated by commas; a missing one gets a row with the reason."
            ),
        ] = "all",
        device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is one.")] = "auto",
        rounds: Annotated[int, typer.Option(min=1, help="Most interleaved rounds of each case.")] = 10,
        minutes: Annotated[
            float,
            typer.Option(min=0.01, help="Time limit; a case that is not reached gets a row that says so."),
        ] = 30.0,
        threads: Annotated[
            int,
            typer.Option(
                min=0,
                help="Compute threads. Default: as many as the CPU quota and affinity allow.",
                show_default=False,
            ),
        ] = 0,
        seed: Annotated[int, typer.Option(min=0, help="Seed of the inputs.")] = 0,
        quick: Annotated[
            bool,
            typer.Option("--quick", help="Smoke test: a tiny shape, two rounds; the figures mean nothing."),
        ] = False,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Measure time, extra memory and gradient error of the loss, eager torch, compilers and fused peers.

        All losses get the same batch in the same run. If the error of a loss or gradient is more than twice plain torch's,
        it gets no ratio. The last line of stdout is a JSON document.

        Example: sbs-edge bench kernels --shapes 2048,512,32128 --out runs/bench-kernels
        """
        require("torch", "The kernel bench", "train")
        from sbs_edge.bench.kernels.bench import KernelOptions, measure_kernels
        from sbs_edge.bench.kernels.cases import CPU_SHAPES, GPU_SHAPES, cases_of, parse_shapes
        from sbs_edge.bench.kernels.peers import names_for

        where = _device(device)
        default = CPU_SHAPES if where == "cpu" else GPU_SHAPES
        given = parse_shapes(shapes) if shapes else ((_QUICK_SHAPE,) if quick else default)
        types = dtype or ("float32" if where == "cpu" else "bfloat16")
        options = KernelOptions(
            cases=cases_of(
                given,
                list(names(types)),
                _shares(padding),
                list(names(data)),
                student,
            ),
            peers=names_for(peers, quick),
            device=where,
            rounds=min(rounds, 2) if quick else rounds,
            calls=3 if where == "cuda" else 1,
            minutes=minutes,
            threads=threads or usable_cpus(),
            seed=seed,
            student=student,
        )
        document = measure_kernels(options, progress)
        document["quick"] = quick
        finish(document, out, ctx, json)
