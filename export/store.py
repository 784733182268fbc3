"""Graphs of one target on disk, their constants in one shared file that runtimes map into memory.

The label scorer and the explainer hold the same encoder; a constant with the same bytes is stored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto

__all__ = ["SHARED", "save_graphs"]

SHARED = "weights.bin"
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 4096  # a page, so that each constant can be mapped on its own


def save_graphs(models: Mapping[str, onnx.ModelProto], folder: Path) -> None:
    """Write every model as ``<name>.onnx`` and their constants as ``weights.bin`` into ``folder``.

    The models are changed: their constants become references into the shared file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[bytes, tuple[int, int]] = {}
    with (folder / SHARED).open("wb") as shared:
        for model in models.values():
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) >= EXTERNAL_FROM_BYTES:
                    _move_out(tensor, shared, known)
    if not known:
        (folder / SHARED).unlink()
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def _move_out(tensor: TensorProto, shared: BinaryIO, known: dict[bytes, tuple[int, int]]) -> None:
    digest = hashlib.sha256(tensor.raw_data).digest()
    if digest not in known:
        offset = -(-shared.tell() // ALIGNMENT) * ALIGNMENT
        shared.seek(offset)
        shared.write(tensor.raw_data)
        known[digest] = (offset, len(tensor.raw_data))
    offset, length = known[digest]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", SHARED), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
