"""Choose the engine that computes the loss, and check that it works here."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import NamedTuple

import torch

from sbs_edge.kernels.tile_table import interpreted

__all__ = ["ENGINES", "EngineStatus", "available_engines", "resolve", "select_engine"]

ENGINES = ("triton", "cublas", "torch", "reference")


class EngineStatus(NamedTuple):
    """An engine, and whether it can run on this machine."""

    name: str
    available: bool
    reason: str


OLDEST_TILES = (8, 0)
OLDEST_TRITON = (7, 0)
_UNMEASURED = "checked in the interpreter and built ahead of time, not yet run on a GPU"


@lru_cache(maxsize=16)
def _capability(index: int | None = None) -> tuple[int, int] | None:
    """Return the compute capability of NVIDIA device ``index`` (None: the current one), or None without a device."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(index)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _status(name: str) -> EngineStatus:
    if name in ("torch", "reference"):
        what = "sliced, bounded memory" if name == "torch" else "full logits, for comparison only"
        return EngineStatus(name, True, f"any device; {what}")
    if not _has_triton():
        return EngineStatus(name, False, "triton is not installed; pip install 'sbs-edge[train]'")
    if interpreted():
        return EngineStatus(
            name, True, "Triton's interpreter (TRITON_INTERPRET=1): slow, float32 and float16"
        )
    capability = _capability()
    if capability is None:
        return EngineStatus(name, False, "no NVIDIA GPU that torch can use")
    shown = f"sm_{capability[0]}{capability[1]}"
    if capability < OLDEST_TRITON:
        return EngineStatus(name, False, f"{shown}: Triton needs sm_70 or newer")
    if name == "triton" and capability < OLDEST_TILES:
        return EngineStatus(
            name, False, f"{shown}: Triton has tensor-core products from sm_80 on; see cublas"
        )
    types = "16 bits" if name == "triton" else "float32"
    if capability < OLDEST_TILES:
        types = "every type but float64"
    return EngineStatus(name, True, f"{shown}; chosen by auto for {types}; {_UNMEASURED}")


def available_engines() -> list[EngineStatus]:
    """Return every engine with the reason why it works or does not."""
    return [_status(name) for name in ENGINES]


def select_engine(device: torch.device, dtype: torch.dtype) -> str:
    """Return the engine that ``engine="auto"`` chooses for tensors of ``dtype`` on ``device``.

    16-bit types use ``triton`` from sm_80 on and ``cublas`` from sm_70 on (Triton has no tensor-core products for
    Turing). float32, which runs outside the tensor cores, uses ``cublas``, which the assumed rates
    favour. Everything else uses ``torch``, and so does float64, which the other two would round.
    """
    if device.type != "cuda" or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "torch"
    capability = _capability(device.index)
    if capability is None or capability < OLDEST_TRITON or not _has_triton():
        return "torch"
    return "triton" if capability >= OLDEST_TILES and dtype != torch.float32 else "cublas"


def resolve(engine: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the engine to run for tensors of ``dtype`` on ``device``.

    Raises:
        ValueError: no engine has this name.
        RuntimeError: the engine cannot run here; the message says why.
    """
    if engine == "auto":
        return select_engine(device, dtype)
    if engine not in ENGINES:
        raise ValueError(f"engine must be 'auto' or one of {', '.join(ENGINES)}; not {engine!r}.")
    if engine in ("torch", "reference"):
        return engine
    status = _status(engine)
    reason = None if status.available else status.reason
    if reason is None and device.type != "cuda" and not interpreted():
        reason = f"the tensors are on {device.type}, not on a GPU"
    if reason is None and dtype == torch.bfloat16 and interpreted():
        reason = "Triton's interpreter multiplies bfloat16 wrongly; take float32 or float16 there"
    if reason is None and dtype == torch.float64:
        reason = "it computes in float32; float64 needs engine='torch'"
    if reason is not None:
        raise RuntimeError(f"The engine {engine!r} cannot run here: {reason}.")
    return engine
