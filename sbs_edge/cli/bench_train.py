"""``sbs-edge bench train``: the optimizer step and its peers."""

from __future__ import annotations

from typing import Annotated

import typer

from sbs_edge.cli._bench import OutOption, finish, names, progress, require
from sbs_edge.cli._common import ConfigOption, JsonOption

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``train`` to the benchmark commands."""

    @app.command()
    def train(
        ctx: typer.Context,
        data: Annotated[str, typer.Argument(help="A file, a directory, or 'builtin'.")] = "builtin",
        dataset: Annotated[
            str | None, typer.Option(help="Read DATA in the paper's layout: cqa, svamp, anli1 or esnli.")
        ] = None,
        shape: Annotated[
            str, typer.Option(help="Size of the student: t5-small, t5-v1_1-small, flan-t5-base or tiny.")
        ] = "t5-small",
        batch_size: Annotated[int, typer.Option(min=1, help="Examples per step; each gives two rows.")] = 8,
        examples: Annotated[int, typer.Option(min=2, help="Examples in the epoch.")] = 64,
        steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of the loss curves.")] = 8,
        rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of single steps.")] = 6,
        device: Annotated[str, typer.Option(help="cpu, cuda, or all devices present.")] = "all",
        precision: Annotated[str, typer.Option(help="fp32, bf16 (autocast), separated by commas.")] = "fp32",
        threads: Annotated[int, typer.Option(min=1, help="Compute threads of every step.")] = 1,
        seed: Annotated[
            int, typer.Option(min=0, help="Seed of the weights and of the order of the data.")
        ] = 0,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Compare an optimizer step and an epoch with plain training: two forward passes and full logits.

        The figures are time, tokens per second, peak memory in a fresh process, padding, and the loss on the same
        seed and data, which must agree. The last line of stdout is a JSON document.

        Example: sbs-edge bench train --shape t5-small --out runs/bench-train
        """
        require("torch", "The training bench")
        require("transformers", "The training bench")
        from sbs_edge.bench.training.bench import TrainBenchOptions, measure_train

        options = TrainBenchOptions(
            data=data,
            dataset=dataset,
            shape=shape,
            batch_size=batch_size,
            examples=examples,
            steps=steps,
            rounds=rounds,
            device=device,
            precisions=names(precision),
            threads=threads,
            seed=seed,
        )
        document = measure_train(options, progress)
        finish(document, out, ctx, json)
