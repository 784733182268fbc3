"""Test whether this machine multiplies uint8 by int8 exactly.

On x86 without VNNI (Intel before Cascade Lake, AMD before Zen 4) onnxruntime adds pairs of such products in 16 bits,
which saturate: 255 * 127 * 2 becomes 32767. ``session.x64quantprecision`` makes the products exact there, and costs
time on every other x86 machine, so it is set only where the probe says so. ARM64 and SSE-only machines are exact.
"""

from __future__ import annotations

import base64
import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sbs_edge.errors import MissingExtra
from sbs_edge.runtime.ort import onnxruntime_module

__all__ = [
    "EXACT_OPTION",
    "int8_products",
    "needs_exact_option",
    "on_x86",
    "products_saturate",
    "warn_of_old_loops",
]

EXACT_OPTION = ("session.x64quantprecision", "1")

# y (1, 16) float32 = MatMulIntegerToFloat(a (1, 4) uint8, 127 everywhere (4, 16) int8, scales of 1, zero point 0).
_GRAPH = base64.b64decode(
    "CAoSADqVAgo3CgFhCgF3CgFzCgF0CgF6EgF5IhRNYXRNdWxJbnRlZ2VyVG9GbG9hdDoNY29tLm1pY3Jvc29mdBIBZypLCAQIEBAD"
    "QgF3SkB/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/f39/KgsQAUIB"
    "c0oEAACAPypJCBAQAUIBdEpAAACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPwAAgD8A"
    "AIA/AACAPyoIEAJCAXpKAQBaEwoBYRIOCgwIAhIICgIIAQoCCARiEwoBeRIOCgwIARIICgIIAQoCCBBCBAoAEBVCEQoNY29tLm1p"
    "Y3Jvc29mdBAB"
)


@cache
def products_saturate() -> bool:
    """Return whether a product of 255 and 127 over four inputs is wrong here; computed once per process.

    Raises:
        MissingExtra: onnxruntime is not installed.
    """
    onnxruntime = onnxruntime_module()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_GRAPH, options, providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {"a": np.full((1, 4), 255, np.uint8)})[0]
    return bool((found != 4 * 255 * 127).any())


def on_x86() -> bool:
    """Return whether this is an x86-64 machine."""
    return platform.machine().lower() in ("x86_64", "amd64")


def needs_exact_option() -> bool:
    """Return whether int8 graphs need :data:`EXACT_OPTION` here; it exists on x86-64 alone."""
    return on_x86() and products_saturate()


def int8_products() -> str | None:
    """Return ``exact``, ``corrected`` (products saturate, so sessions set the option), or None without onnxruntime."""
    try:
        return "corrected" if needs_exact_option() else "exact"
    except MissingExtra:
        return None


@cache
def warn_of_old_loops(graph: Path) -> None:
    """Warn once that the option does not reach the loop of a ``graph`` whose weights are outside the loop."""
    import logging  # imported here, because most starts warn of nothing

    logging.getLogger("sbs_edge.runtime").warning(
        "%s was exported by an earlier version: on this CPU, which has no VNNI, rationales and open labels may differ "
        "from those that were measured at export. Labels of closed sets and choices do not. Export the bundle again to "
        "make them equal.",
        graph,
    )
