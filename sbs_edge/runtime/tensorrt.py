"""Options of onnxruntime's TensorRT providers for a graph: shapes, number formats, and where engines are kept.

Without profiles the provider builds an engine for every new shape, which takes seconds to
minutes. With them an engine answers every shape within the limits. Option names: onnxruntime's
documentation of the TensorRT and the TensorRT RTX execution provider.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sbs_edge.errors import IntegrityError
from sbs_edge.runtime import cache as user_cache

__all__ = ["RTX", "TENSORRT", "tensorrt_options"]

TENSORRT = "TensorrtExecutionProvider"
RTX = "NvTensorRTRTXExecutionProvider"

_PREFIX = {TENSORRT: "trt", RTX: "nv"}


def tensorrt_options(graph: Path, provider: str, digests: Sequence[str] | None) -> dict[str, str]:
    """Return the provider's options for ``graph``.

    Args:
        graph: an ONNX file; ``<graph>.profile.json`` beside it holds the shapes of its inputs.
        provider: :data:`TENSORRT` or :data:`RTX`.
        digests: SHA-256 of the graph's files, to keep built engines in the user's cache directory; None: do not.

    Raises:
        IntegrityError: the profile cannot be read.
    """
    prefix = _PREFIX[provider]
    options = {
        f"{prefix}_profile_{which}_shapes": shapes for which, shapes in _profiles(graph).items() if shapes
    }
    if provider == TENSORRT:  # the other one takes every number format as the graph has it
        options["trt_fp16_enable"] = "1"
        if (
            b"QuantizeLinear" in graph.read_bytes()
        ):  # allowed without such pairs, it asks for a calibration table
            options["trt_int8_enable"] = "1"
    folder = _engines(digests) if digests else None
    if folder is not None and provider == TENSORRT:
        options |= {
            "trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1", "trt_timing_cache_path": str(folder),
        }  # fmt: skip
    elif folder is not None:
        options["nv_runtime_cache_path"] = str(folder)
    return options


def _profiles(graph: Path) -> dict[str, str]:
    """Return "min", "opt" and "max" -> ``name:1x64,...``, for every input that has a free dimension."""
    path = graph.with_name(graph.name + ".profile.json")
    if not path.exists():
        return {}
    try:
        inputs: Mapping[str, Mapping[str, Sequence[int]]] = json.loads(path.read_text(encoding="utf-8"))
        free = {name: shapes for name, shapes in inputs.items() if shapes["min"] != shapes["max"]}
        return {
            which: ",".join(
                f"{name}:{'x'.join(str(int(size)) for size in shapes[which])}"
                for name, shapes in free.items()
            )
            for which in ("min", "opt", "max")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path} does not have the shapes of a graph's inputs ({type(error).__name__}: {error}). Export the "
            "bundle again."
        ) from error


def _engines(digests: Sequence[str]) -> Path | None:
    """Return the directory of this user's engines for a graph, or None if nothing can be stored."""
    try:
        root = user_cache.cache_directory("tensorrt")
        if not user_cache.private_directory(root):
            return None
        folder = root / hashlib.sha256("\n".join(digests).encode()).hexdigest()[:40]
        return folder if user_cache.private_directory(folder) else None
    except (OSError, RuntimeError):
        return None
