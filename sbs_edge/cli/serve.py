"""``sbs-edge serve``: bundles behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, DryRunOption, JsonOption, print_json
from sbs_edge.errors import MissingExtra, UsageError

__all__ = ["register"]

_FLAGS = {"watch_s": "watch", "drain_timeout_s": "drain_timeout"}  # settings whose flag has another name


def _found(name: str | None, path: Path, max_versions: int) -> dict[str, Any]:
    """Say which bundles would be served for one argument; their manifests are read, their files are not."""
    from sbs_edge.runtime.manifest import read_manifest
    from sbs_edge.serve.models import Model

    # A folder without any bundle is read as one itself, which says what is missing.
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
                help="A bundle, or a folder with one bundle for each version; several may be given.",
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
                help="Processes that answer together; each has an event loop, and an equal part of the limits. "
                "They share the weights' memory.",
            ),
        ] = 1,
        target: Annotated[
            str | None, typer.Option(help="Which target of the bundle to run; its default when left out.")
        ] = None,
        threads: Annotated[
            int | None,
            typer.Option(
                min=1,
                help="CPU threads of one inference; more shortens a call, fewer let calls overlap. "
                "None: as many as the CPU quota and affinity allow.",
            ),
        ] = None,
        watch: Annotated[
            float,
            typer.Option(min=0, help="Look for new versions every so many seconds; 0 only on SIGHUP."),
        ] = 0.0,
        max_versions: Annotated[
            int, typer.Option(min=1, help="Newest versions kept in memory; each costs its size.")
        ] = 2,
        max_batch_tokens: Annotated[
            int,
            typer.Option(
                min=1,
                help="Tokens in one inference, padding included; larger adds latency, hardly throughput.",
            ),
        ] = 512,
        max_wait_ms: Annotated[
            float,
            typer.Option(
                min=0,
                max=1000,
                help="Longest time a text waits for company; only while others are on their way.",
            ),
        ] = 2.0,
        label_workers: Annotated[
            int, typer.Option(min=1, help="Label batches run at once; each uses --threads threads.")
        ] = 1,
        rationale_workers: Annotated[
            int, typer.Option(min=1, help="Rationale batches run at once, beside the label batches.")
        ] = 1,
        worker_nice: Annotated[
            int,
            typer.Option(
                min=0,
                max=19,
                help="Priority steps of inference below the event loop: refusals are quicker on a busy core, and "
                "other processes of the machine go first.",
            ),
        ] = 0,
        truncate: Annotated[
            bool,
            typer.Option("--truncate", help="Cut texts over the token limit and say so, instead of a 400."),
        ] = False,
        max_body_bytes: Annotated[
            int, typer.Option(min=1, help="Larger bodies, counted after decompression, get 413.")
        ] = 2_000_000,
        max_inside_bytes: Annotated[
            int,
            typer.Option(
                min=1, help="More bytes of bodies inside at once get 429: plan four times this in memory."
            ),
        ] = 67_108_864,
        max_texts: Annotated[int, typer.Option(min=1, help="More texts in one request get 400.")] = 32,
        max_concurrent: Annotated[int, typer.Option(min=1, help="More requests at once get 429.")] = 512,
        max_queue_texts: Annotated[
            int, typer.Option(min=1, help="More texts inside one model's queue get 429 instead of waiting.")
        ] = 1024,
        max_queue_ms: Annotated[
            float,
            typer.Option(
                min=0, help="A longer estimated wait gets 429: lower refuses earlier and answers sooner."
            ),
        ] = 500.0,
        timeout_s: Annotated[
            float,
            typer.Option(min=0, help="Requests not answered in this time get 504; a header may set another."),
        ] = 30.0,
        body_timeout_s: Annotated[
            float,
            typer.Option(min=0, help="Bodies that take longer to arrive get 408: a slow link may need more."),
        ] = 10.0,
        head_timeout_s: Annotated[
            float,
            typer.Option(min=0, help="Connections whose request line and headers take longer are closed."),
        ] = 10.0,
        max_head_bytes: Annotated[
            int,
            typer.Option(
                min=1024, help="Longer request lines and headers get 431; more is memory for strangers."
            ),
        ] = 65_536,
        max_connections: Annotated[
            int, typer.Option(min=1, help="More connections at once get 503; each may hold one head.")
        ] = 2048,
        drain_timeout: Annotated[
            float,
            typer.Option(
                min=0, help="Seconds running requests get after SIGTERM; then they are cut (exit 1)."
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
                help="OpenAI-compatible base URL asked when the student is unsure: texts leave this machine. "
                "The key comes from SBS_EDGE_SERVE_ESCALATE_KEY."
            ),
        ] = None,
        escalate_model: Annotated[str, typer.Option(help="Model name sent to it.")] = "default",
        escalate_timeout_s: Annotated[
            float, typer.Option(min=0, help="After this the student's own answer is given, marked as unsure.")
        ] = 10.0,
        escalate_concurrency: Annotated[
            int,
            typer.Option(min=1, help="Escalated texts at once; what is beyond keeps the student's answer."),
        ] = 8,
        abstain_below: Annotated[
            float | None,
            typer.Option(
                min=0,
                max=1,
                help="Probability below which an answer is marked unsure; the bundle's when left out.",
            ),
        ] = None,
        record: Annotated[
            Path | None,
            typer.Option(
                help="Keep the texts of doubtful and escalated answers in this .jsonl file, which annotate reads: "
                "personal data may follow. Only its owner may read it (mode 0600)."
            ),
        ] = None,
        record_below: Annotated[
            float,
            typer.Option(
                min=0, max=1, help="Record answers with a lower probability; abstained ones always are."
            ),
        ] = 0.8,
        record_share: Annotated[
            float, typer.Option(min=0, max=1, help="Record this share of them, at random.")
        ] = 1.0,
        record_max_bytes: Annotated[
            int,
            typer.Option(min=4096, help="Bytes of the recorded file and its three older parts together."),
        ] = 67_108_864,
        log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
        log_inputs: Annotated[
            bool, typer.Option("--log-inputs", help="Write the texts into the log: personal data may follow.")
        ] = False,
        access_log: Annotated[
            bool,
            typer.Option(help="One log line for each answered request; off saves the time of writing them."),
        ] = True,
        otel_endpoint: Annotated[
            str | None, typer.Option(help="Send OpenTelemetry traces to this OTLP/HTTP URL (extra 'otel').")
        ] = None,
        dry_run: DryRunOption = False,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Serve bundles over HTTP: Open Inference Protocol v2 and POST /v1/predict.

        Loads, verifies and warms each bundle before /v2/health/ready says yes. SIGTERM drains,
        SIGHUP looks for new versions. Logs are JSON on stderr.

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
                record=record,
                record_below=record_below,
                record_share=record_share,
                record_max_bytes=record_max_bytes,
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
        if settings.record is not None:
            files.check_writable(settings.record)
        if dry_run:
            plan = settings.model_dump(mode="json")
            plan["sources"] = [_found(name, path, max_versions) for name, path in sources]
            print_json(plan)
            return
        logs.configure(log_level)
        code = server.serve(sources, settings)
        if code:
            raise typer.Exit(code)
