"""Write the graphs of a target, with their constants in files that runtimes map into memory.

The label classifier and the rationale generator have the same encoder, and equal constants are stored once. The
constants of the first graph are in ``weights.bin``; those that only a later graph needs are in a file of its name. So
a process that only needs labels never reads or checks the rationale generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

from sbs_edge.export.graphs.builder import all_graphs

__all__ = ["SHARED", "save_graphs"]

SHARED = "weights.bin"
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 4096  # a page, so that each constant can be mapped on its own

_Place = tuple[str, int, int]  # file, offset, bytes


def save_graphs(
    models: Mapping[str, onnx.ModelProto] | Iterable[tuple[str, onnx.ModelProto]], folder: Path
) -> list[str]:
    """Write every model as ``<name>.onnx`` and their constants into ``folder``.

    The models are changed: their constants become references into ``weights.bin``, or into ``<name>.bin`` for
    those that no earlier model has. So a graph is never serialised with its constants, and may have more
    than the 2 GB that protobuf allows. Each model of an iterable is released before the next is built.

    Returns:
        The models' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[bytes, _Place] = {}
    names: list[str] = []
    for name, model in models.items() if isinstance(models, Mapping) else models:
        data = folder / (f"{name}.bin" if names else SHARED)
        with data.open("wb") as file:
            for graph in all_graphs(model.graph):
                for tensor in graph.initializer:
                    _move_out(tensor, file, data.name, known)
            empty = file.tell() == 0
        if empty:
            data.unlink()
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        names.append(name)
    return names


def _move_out(tensor: TensorProto, file: BinaryIO, name: str, known: dict[bytes, _Place]) -> None:
    content = tensor.raw_data  # read once, because each read is a copy
    if len(content) < EXTERNAL_FROM_BYTES:
        return
    digest = hashlib.sha256(content).digest()
    if digest not in known:
        offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        file.seek(offset)
        file.write(content)
        known[digest] = (name, offset, len(content))
    place, offset, length = known[digest]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
