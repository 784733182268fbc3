"""``sbs-edge serve``: bundles behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sbs_edge.cli._common import ConfigOption, DryRunOption, JsonOption, print_json
from sbs_edge.errors import MissingExtra, UsageError

__all__ = ["register"]

_FLAGS = {"watch_s": "watch", "drain_timeout_s": "drain_timeout"}  # settings whose flag has another name


def _found(name: str | None, path: Path, max_versions: int) -> dict[str, Any]:
    """Return the bundles that would be served for an argument, from their manifests alone."""
    from sbs_edge.runtime.manifest import read_manifest
    from sbs_edge.serve.models import Model

    # A folder without any bundle is read as a bundle itself, so that the error says what is missing.
    found = Model(name, path).candidates(max_versions)[:max_versions] or [(None, path)]
    bundles = [(version, bundle, read_manifest(bundle)) for version, bundle in found]
    return {
        "name": name or bundles[0][2].get("name"),
        "path": str(path),
        "bundles": [
            {
                "path": str(bundle),
                "version": version or manifest.get("version"),
                "targets": list(manifest["targets"]),
            }
            for version, bundle, manifest in bundles
        ],
    }


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def serve(
        ctx: typer.Context,
        bundles: Annotated[
            list[str],
            typer.Argument(
                metavar="[NAME=]PATH...",
                help="A bundle, or a folder with a bundle for each version; several may be given.",
            ),
        ],
        host: Annotated[
            str, typer.Option(help="Address to bind; anything but loopback lets other machines in.")
        ] = "127.0.0.1",
        port: Annotated[
            int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one and logs it.")
        ] = 8080,
        uds: Annotated[
            Path | None,
            typer.Option(help="Listen on this Unix socket instead of an address (mode 0660)."),
        ] = None,
        workers: Annotated[
            int,
            typer.Option(
                min=1,
                max=256,
                help="Processes that share the port, the memory of the weights and, in equal parts, the limits.",
            ),
        ] = 1,
        target: Annotated[
            str | None, typer.Option(help="Target of the bundle to run. Default: its first.")
        ] = None,
        threads: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="CPU threads per inference: more make a call shorter, fewer let calls overlap. "
                "Default: as many as the CPU quota and affinity allow.",
            ),
        ] = None,
        watch: Annotated[
            float,
            typer.Option(min=0, help="Seconds between checks for new versions; 0 checks only on SIGHUP."),
        ] = 0.0,
        max_versions: Annotated[
            int, typer.Option(min=1, help="Versions to keep in memory, the newest first.")
        ] = 2,
        max_batch_tokens: Annotated[
            int,
            typer.Option(
                min=1,
                help="Tokens per inference, padding included; more adds latency and little throughput.",
            ),
        ] = 512,
        max_wait_ms: Annotated[
            float,
            typer.Option(
                min=0,
                max=1000,
                help="Longest wait for texts that are still being tokenised; a lone text never waits.",
            ),
        ] = 2.0,
        label_workers: Annotated[
            int, typer.Option(min=1, help="Label batches that run at once, each with --threads threads.")
        ] = 1,
        rationale_workers: Annotated[
            int, typer.Option(min=1, help="Rationale batches that run at once, beside the label batches.")
        ] = 1,
        worker_nice: Annotated[
            int,
            typer.Option(
                min=0,
                max=19,
                help="Niceness of inference below the event loop: rejections are faster on a busy core, but other "
                "processes of the machine go first.",
            ),
        ] = 0,
        truncate: Annotated[
            bool,
            typer.Option(
                "--truncate", help="Cut texts over the token limit and say so, instead of answering 400."
            ),
        ] = False,
        max_body_bytes: Annotated[
            int, typer.Option(min=1, help="Largest body, counted after decompression; larger get 413.")
        ] = 2_000_000,
        max_inside_bytes: Annotated[
            int,
            typer.Option(
                min=1,
                help="Most bytes of bodies in the server at once; more get 429. Plan four times this in memory.",
            ),
        ] = 67_108_864,
        max_texts: Annotated[int, typer.Option(min=1, help="Most texts per request; more get 400.")] = 32,
        max_concurrent: Annotated[
            int, typer.Option(min=1, help="Most requests at once; more get 429.")
        ] = 512,
        max_queue_texts: Annotated[
            int, typer.Option(min=1, help="Most texts in the queue of a model; more get 429.")
        ] = 1024,
        max_queue_ms: Annotated[
            float,
            typer.Option(
                min=0,
                help="Longest estimated wait; a longer one gets 429. Lower rejects earlier and answers sooner.",
            ),
        ] = 500.0,
        timeout_s: Annotated[
            float,
            typer.Option(
                min=0, help="Longest time to answer; later is a 504. A request header may set another time."
            ),
        ] = 30.0,
        body_timeout_s: Annotated[
            float,
            typer.Option(
                min=0, help="Longest time for a body to arrive; later is a 408. A slow link may need more."
            ),
        ] = 10.0,
        head_timeout_s: Annotated[
            float,
            typer.Option(
                min=0, help="Longest time for the request line and headers; then the connection is closed."
            ),
        ] = 10.0,
        max_head_bytes: Annotated[
            int,
            typer.Option(
                min=1024,
                help="Most bytes of request line and headers; more get 431. Any client can use this memory.",
            ),
        ] = 65_536,
        max_connections: Annotated[
            int,
            typer.Option(
                min=1, help="Most connections at once; more get 503. Each may hold a full set of headers."
            ),
        ] = 2048,
        drain_timeout: Annotated[
            float,
            typer.Option(
                min=0, help="Seconds for running requests after SIGTERM; then they are cut off (exit 1)."
            ),
        ] = 30.0,
        token_file: Annotated[
            Path | None,
            typer.Option(
                help="File with a bearer token every request must carry (health probes excepted); "
                "or set SBS_EDGE_SERVE_TOKEN."
            ),
        ] = None,
        tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain; needs --tls-key.")] = None,
        tls_key: Annotated[Path | None, typer.Option(help="PEM private key; needs --tls-cert.")] = None,
        escalate_url: Annotated[
            str | None,
            typer.Option(
                help="OpenAI-compatible base URL that is asked when the student is uncertain: texts leave this machine. "
                "The key is SBS_EDGE_SERVE_ESCALATE_KEY."
            ),
        ] = None,
        escalate_model: Annotated[str, typer.Option(help="Name of the larger model.")] = "default",
        escalate_timeout_s: Annotated[
            float,
            typer.Option(
                min=0,
                help="Longest wait for the larger model; then the student's answer stays, marked as uncertain.",
            ),
        ] = 10.0,
        escalate_concurrency: Annotated[
            int,
            typer.Option(min=1, help="Most escalated texts at once; others keep the student's answer."),
        ] = 8,
        abstain_below: Annotated[
            float | None,
            typer.Option(
                min=0,
                max=1,
                help="Probability below which an answer is marked as uncertain. Default: the bundle's.",
            ),
        ] = None,
        log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
        log_inputs: Annotated[
            bool,
            typer.Option("--log-inputs", help="Write the texts into the log. They may be personal data."),
        ] = False,
        access_log: Annotated[
            bool,
            typer.Option(help="Write a log line for each answered request."),
        ] = True,
        otel_endpoint: Annotated[
            str | None, typer.Option(help="Send OpenTelemetry traces to this OTLP/HTTP URL (extra 'otel').")
        ] = None,
        dry_run: DryRunOption = False,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Serve bundles over HTTP: Open Inference Protocol v2 and POST /v1/predict.

        Each bundle is loaded, verified and warmed up before /v2/health/ready answers 200. SIGTERM drains; SIGHUP
        checks for new versions. Logs are JSON on stderr.

        Example: sbs-edge serve desk=runs/latest/bundle --port 8080
        """
        from pydantic import ValidationError

        try:
            from sbs_edge.serve import logs, server
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "starlette", "serve", "The server") from error
        from sbs_edge.serve.models import parse_source
        from sbs_edge.serve.settings import ServeSettings

        token = os.environ.get("SBS_EDGE_SERVE_TOKEN")
        if token_file is not None:
            try:
                token = token_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise UsageError(f"The token file {token_file} cannot be read: {error.strerror}.") from error
        try:
            settings = ServeSettings(
                host=host,
                port=port,
                uds=uds,
                workers=workers,
                target=target,
                threads=threads,
                watch_s=watch,
                max_versions=max_versions,
                max_batch_tokens=max_batch_tokens,
                max_wait_ms=max_wait_ms,
                label_workers=label_workers,
                rationale_workers=rationale_workers,
                worker_nice=worker_nice,
                truncate=truncate,
                max_body_bytes=max_body_bytes,
                max_inside_bytes=max_inside_bytes,
                max_texts=max_texts,
                max_concurrent=max_concurrent,
                max_queue_texts=max_queue_texts,
                max_queue_ms=max_queue_ms,
                timeout_s=timeout_s,
                body_timeout_s=body_timeout_s,
                head_timeout_s=head_timeout_s,
                max_head_bytes=max_head_bytes,
                max_connections=max_connections,
                drain_timeout_s=drain_timeout,
                token=token,  # type: ignore[arg-type]  # pydantic wraps it
                tls_cert=tls_cert,
                tls_key=tls_key,
                escalate_url=escalate_url,
                escalate_model=escalate_model,
                escalate_key=os.environ.get("SBS_EDGE_SERVE_ESCALATE_KEY"),  # type: ignore[arg-type]
                escalate_timeout_s=escalate_timeout_s,
                escalate_concurrency=escalate_concurrency,
                abstain_below=abstain_below,
                log_inputs=log_inputs,
                access_log=access_log,
                otel_endpoint=otel_endpoint,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = "-".join(str(part) for part in first["loc"])
            where = "--" + _FLAGS.get(field, field).replace("_", "-")
            raise UsageError(f"{where if first['loc'] else 'The options'}: {first['msg']}.") from error
        if log_level not in ("debug", "info", "warning", "error"):
            raise UsageError("--log-level must be debug, info, warning or error.")
        sources = [parse_source(argument) for argument in bundles]
        for _, path in sources:
            if not path.is_dir():
                raise UsageError(f"There is no directory {path} to serve a bundle from. Check the path.")
        if dry_run:
            plan = settings.model_dump(mode="json")
            plan["sources"] = [_found(name, path, max_versions) for name, path in sources]
            print_json(plan)
            return
        logs.configure(log_level)
        code = server.serve(sources, settings)
        if code:
            raise typer.Exit(code)
