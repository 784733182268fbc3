"""``sbs-edge serve``: bundles behind HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, DryRunOption, JsonOption, print_json
from sbs_edge.cli._fields import field_options
from sbs_edge.errors import MissingExtra, UsageError
from sbs_edge.serve.settings import ServeSettings

__all__ = ["register"]

_FLAGS = {"watch_s": "watch", "drain_timeout_s": "drain_timeout"}  # settings whose option has another name
_FIELDS = {option: field for field, option in _FLAGS.items()}


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
    @field_options(ServeSettings, before="token_file", flags=_FLAGS)
    def serve(
        ctx: typer.Context,
        bundles: Annotated[
            list[str],
            typer.Argument(
                metavar="[NAME=]PATH...",
                help="A bundle, or a folder with a bundle for each version; several may be given.",
            ),
        ],
        token_file: Annotated[
            Path | None,
            typer.Option(
                help="File with a bearer token every request must carry (health probes excepted); "
                "or set SBS_EDGE_SERVE_TOKEN."
            ),
        ] = None,
        log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
        dry_run: DryRunOption = False,
        json: JsonOption = False,
        config: ConfigOption = None,
        **fields: Any,
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

        token = os.environ.get("SBS_EDGE_SERVE_TOKEN")
        if token_file is not None:
            try:
                token = token_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise UsageError(f"The token file {token_file} cannot be read: {error.strerror}.") from error
        try:
            settings = ServeSettings(
                **{_FIELDS.get(name, name): value for name, value in fields.items()},
                token=token,  # type: ignore[arg-type]  # pydantic wraps it
                escalate_key=os.environ.get("SBS_EDGE_SERVE_ESCALATE_KEY"),  # type: ignore[arg-type]
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
            plan["sources"] = [_found(name, path, settings.max_versions) for name, path in sources]
            print_json(plan)
            return
        logs.configure(log_level)
        code = server.serve(sources, settings)
        if code:
            raise typer.Exit(code)
