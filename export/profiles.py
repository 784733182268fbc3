"""Optimisation profiles for TensorRT: the smallest, usual and largest shape of every input, as JSON beside a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx

__all__ = ["profile_of"]


def profile_of(model: onnx.ModelProto, limits: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """Return input name -> {"min", "opt", "max"} shapes.

    Args:
        model: a graph whose free dimensions have names.
        limits: (least, usual, most) for every name, e.g. ``{"batch": (1, 1, 8), "source": (1, 64, 512)}``.

    Raises:
        KeyError: a dimension's name has no limits.
    """
    found: dict[str, Any] = {}
    for value in model.graph.input:
        shape = value.type.tensor_type.shape.dim
        found[value.name] = {
            which: [dim.dim_value or limits[dim.dim_param][index] for dim in shape]
            for index, which in enumerate(("min", "opt", "max"))
        }
    return found
