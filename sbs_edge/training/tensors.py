"""Read the tensors of a checkpoint's files unchanged: safetensors or .bin, whole or sharded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sbs_edge.errors import UsageError
from sbs_edge.training.checkpoint import weight_files

__all__ = ["read_tensors"]

# Prefixes that wrappers add to every name: DistributedDataParallel, torch.compile, a Lightning module.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the state dict in the weight files of ``folder``, with tensors in the files' own precision.

    A .bin file is read with ``weights_only=True``, which runs no code from the file.

    Raises:
        UsageError: there are no weights, or a file is damaged or has other content.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors.update(_safe(path) if path.suffix == ".safetensors" else _bin(path))
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING:
            raise UsageError(
                f"{folder} has {name} as {str(tensor.dtype).removeprefix('torch.')}: its weights are quantised. Give the "
                "checkpoint it was made from; export quantises by itself (target cpu-int8)."
            )
    return tensors


def _damaged(path: Path, reason: object) -> UsageError:
    with path.open("rb") as handle:
        begin = handle.read(24)
    if begin.startswith(b"version https://git-lfs"):
        return UsageError(
            f"{path} is a pointer of Git LFS, not the weights. Fetch them: cd {path.parent} && git lfs pull"
        )
    said = " ".join(str(reason).split())[:200].rstrip(".")
    return UsageError(
        f"The weights {path} cannot be read ({said}); the file has {path.stat().st_size:,} bytes and is damaged or cut off. "
        "Copy it again from where the checkpoint was saved."
    )


def _safe(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _bin(path: Path) -> dict[str, Tensor]:
    try:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # PyTorch's format before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as handle:
            begin = handle.read(2)
        if begin not in (b"PK", b"\x80\x02"):
            raise _damaged(path, "not a file of PyTorch") from error
        raise UsageError(
            f"{path} contains more than tensors, and opening it could run its author's code. If you trust the file, "
            f"save its tensors alone where you trained: torch.save(model.state_dict(), {path.name!r})."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    for inner in ("state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(
            f"{path} is not a state dict: it has something other than named tensors. Save the model with save_pretrained."
        )
    return {str(name): value for name, value in content.items()}
