"""Which engine computes the loss, and whether it works here."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

__all__ = ["ENGINES", "EngineStatus", "available_engines", "resolve", "select_engine"]

ENGINES = ("triton", "cublas", "torch", "reference")


class EngineStatus(NamedTuple):
    """One engine and whether it can run on this machine."""

    name: str
    available: bool
    reason: str


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _status(name: str) -> EngineStatus:
    capability = _capability()
    if name in ("torch", "reference"):
        what = "sliced, bounded memory" if name == "torch" else "full logits, for comparison only"
        return EngineStatus(name, True, f"any device; {what}")
    if importlib.util.find_spec("triton") is None:
        return EngineStatus(name, False, "triton is not installed; pip install 'sbs-edge[train]'")
    if name == "triton":
        return EngineStatus(name, False, "this version ships no Triton tiles; the torch engine is used")
    if _interpreted():
        return EngineStatus(
            name, True, "Triton's interpreter (TRITON_INTERPRET=1): slow, float32 and float16"
        )
    if capability is None:
        return EngineStatus(name, False, "no CUDA device that torch can use")
    shown = f"sm_{capability[0]}{capability[1]}"
    if capability < (7, 0):
        return EngineStatus(name, False, f"{shown}: Triton needs sm_70 or newer")
    return EngineStatus(name, True, f"{shown}; on request only: checked in the interpreter, not yet on a GPU")


def available_engines() -> list[EngineStatus]:
    """Return every engine with the reason why it works or does not."""
    return [_status(name) for name in ENGINES]


def select_engine(device: torch.device, dtype: torch.dtype) -> str:
    """Return the engine that ``engine="auto"`` takes for tensors of ``dtype`` on ``device``.

    Sliced torch everywhere, until a measurement on a GPU shows that the ``cublas`` engine is faster.
    """
    return "torch"


def resolve(engine: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the engine to run.

    Raises:
        ValueError: no engine has this name.
        RuntimeError: the engine cannot run here; the message says why.
    """
    if engine == "auto":
        return select_engine(device, dtype)
    if engine not in ENGINES:
        raise ValueError(f"engine must be 'auto' or one of {', '.join(ENGINES)}; not {engine!r}.")
    status = _status(engine)
    if not status.available:
        raise RuntimeError(f"The engine {engine!r} cannot run here: {status.reason}.")
    return engine
