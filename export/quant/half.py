"""Convert a float32 graph to fp16 or bf16, both weights and activations.

Values named ``wide...``, and values computed from them, stay float32, because sums over a vocabulary and
log-probabilities need it. Integer inputs do not change. Float inputs and outputs of a graph stay float32, except
caches, which never leave the device.
"""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sbs_edge.export.graphs.builder import FLOAT

__all__ = ["CACHES", "WIDE", "HalfType", "numpy_half", "to_half"]

HalfType = Literal["fp16", "bf16"]
WIDE = "wide"
CACHES = ("cross_", "past_", "present_")
# Additive masks are -1e9, but fp16 ends at 65504, and a mask is added to a bias. exp(-30000) is 0 in both types.
LOWEST = -30000.0


def numpy_half(kind: HalfType) -> np.dtype:
    """Return the numpy type of ``kind``."""
    return np.dtype(np.float16) if kind == "fp16" else np.dtype(ml_dtypes.bfloat16)


def to_half(model: onnx.ModelProto, kind: HalfType) -> onnx.ModelProto:
    """Return ``model`` in ``kind``. It must have no subgraphs, because half graphs use a loop on the host.

    If a constant other than a mask would become infinite, the type cannot represent the checkpoint.

    Raises:
        OverflowError: a weight is beyond the type's range.
    """
    code = TensorProto.FLOAT16 if kind == "fp16" else TensorProto.BFLOAT16
    floats = {t.name: t for t in model.graph.initializer if t.data_type == FLOAT}
    made: dict[str, onnx.TensorProto] = {}
    wide: set[str] = set()
    half_inputs: dict[str, str] = {}
    for value in model.graph.input:
        if value.type.tensor_type.elem_type == FLOAT:
            if value.name.startswith(CACHES):
                value.type.tensor_type.elem_type = code
            else:
                half_inputs[value.name] = f"{value.name}_half"
    for node in model.graph.node:
        starts = node.op_type == "Cast" and node.output[0].startswith(WIDE)
        is_wide = starts or any(name in wide for name in node.input)
        if is_wide and node.op_type not in ("ArgMax", "Shape"):
            wide.update(node.output)
        for index, name in enumerate(node.input):
            if name in half_inputs and not (is_wide and not starts):
                node.input[index] = half_inputs[name]
            elif name in floats:
                array = numpy_helper.to_array(floats[name])
                if not is_wide:
                    name = f"{name}_half"
                    node.input[index] = name
                    array = _narrow(array, kind)
                if name not in made:
                    made[name] = numpy_helper.from_array(array, name)
        if node.op_type == "Cast" and not is_wide:
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == FLOAT:
                    attribute.i = code
    tail = []
    for value in model.graph.output:
        if value.type.tensor_type.elem_type != FLOAT or value.name in wide:
            continue
        if value.name.startswith(CACHES):
            value.type.tensor_type.elem_type = code
            continue
        source = f"{value.name}_half"
        for node in model.graph.node:
            if value.name in node.output:
                node.output[list(node.output).index(value.name)] = source
        tail.append(helper.make_node("Cast", [source], [value.name], to=FLOAT))
    read = {name for node in model.graph.node for name in node.input}
    head = [
        helper.make_node("Cast", [name], [half], to=code)
        for name, half in half_inputs.items()
        if half in read
    ]
    kept = [t for t in model.graph.initializer if t.name not in floats]
    nodes = [*head, *model.graph.node, *tail]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend([*kept, *made.values()])
    model.graph.node.extend(nodes)
    return model


def _narrow(array: np.ndarray, kind: HalfType) -> np.ndarray:
    clipped = np.where(array <= LOWEST, np.float32(LOWEST), array)
    with np.errstate(over="ignore"):
        narrow = clipped.astype(numpy_half(kind))
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise OverflowError(f"a weight of magnitude {np.abs(array).max():g} does not fit into {kind}")
    return np.asarray(narrow)
