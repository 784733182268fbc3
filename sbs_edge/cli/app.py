"""Assembles the commands and turns every expected error into one paragraph and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module

import typer
from pydantic import ValidationError
from rich.console import Console

from sbs_edge import __version__
from sbs_edge.cli._command import Interrupted, install
from sbs_edge.errors import SbsEdgeError
from sbs_edge.resources import lacks_memory, memory_advice

__all__ = ["app", "main"]

app = typer.Typer(
    name="sbs-edge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "SBS_EDGE", "help_option_names": ["-h", "--help"]},
    help="Distil the labels and rationales of a large model into a small file that answers in milliseconds.",
)

# Each module under sbs_edge/cli/ registers its commands with `register(app)`; light imports
# only, so that `--help` is fast.
_MODULES: tuple[str, ...] = (
    "run",
    "study",
    "data",
    "train",
    "evaluate",
    "compare",
    "task",
    "annotate",
    "compare_teacher",
    "export",
    "predict",
    "serve",
    "bench",
    "doctor",
)

for _name in _MODULES:
    import_module(f"sbs_edge.cli.{_name}").register(app)
install(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sbs-edge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: bool = typer.Option(False, "--debug", help="Also show the traceback of an expected error."),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_version, help="Show the version and exit."
    ),
) -> None:
    if debug:
        os.environ["SBS_EDGE_DEBUG"] = "1"


def _say(kind: str, message: str) -> None:
    if os.environ.get("SBS_EDGE_DEBUG"):
        traceback.print_exc()
    console = Console(stderr=True)
    console.print(f"[bold red]{kind}:[/] ", end="")
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _validation_message(error: ValidationError) -> str:
    found = [f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg']}" for item in error.errors()]
    return f"The configuration is not valid. {'; '.join(found)}."


def main(args: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0 success, 1 failure, 2 usage or bad input, 3 accuracy check, 4 integrity, 130 interrupted.
    """
    try:
        app(args=args, prog_name="sbs-edge")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt:
        _say("interrupted", "No incomplete file was left under its final name.")
        return 130
    except Interrupted as error:
        _say("interrupted", str(error))
        return error.exit_code
    except SbsEdgeError as error:
        _say("error", str(error))
        return error.exit_code
    except ValidationError as error:
        _say("error", _validation_message(error))
        return 2
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`). That is not our error, and there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _say("error", f"{error.strerror or error}: {error.filename or 'no file named'}.")
        return 1
    except Exception as error:
        if lacks_memory(error):
            _say(
                "error",
                f"There is not enough memory: {str(error) or type(error).__name__}. {memory_advice()}",
            )
            return 1
        _say(
            "internal error", f"{type(error).__name__}: {error}. 'sbs-edge --debug COMMAND ...' shows where."
        )
        return 1
    return 0
