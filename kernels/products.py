"""Matrix products with 16-bit operands and a float32 sum, whatever the device offers for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["add_product", "mixed_products", "product", "whole_sums"]


@lru_cache(maxsize=16)
def _offers(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return hasattr(torch.ops.aten.mm, "dtype_out") and torch.cuda.get_device_capability(device) >= (8, 0)


def mixed_products(device: torch.device) -> bool:
    """Return whether ``device`` multiplies 16-bit operands straight into float32 (sm_80, torch 2.8)."""
    return _offers(device)


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``: summed in float32 and rounded once, to the type of ``out``."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif mixed_products(out.device):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(_without(a, b))


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out += a @ b``, ``out`` in float32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    elif mixed_products(out.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(_without(a, b))


def _without(a: Tensor, b: Tensor) -> Tensor:
    # On a GPU the 16-bit product costs one more rounding; a CPU emulates it, slower than float32.
    return torch.mm(a, b) if a.is_cuda else torch.mm(a.float(), b.float())


@contextmanager
def whole_sums() -> Iterator[None]:
    """Keep cuBLAS from adding the parts of a split sum in 16 bits, which torch allows by default."""
    flags = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(flags, name) for name in names]
    try:
        for name in names:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(flags, name, value)
