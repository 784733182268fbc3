"""Matrix products with 16-bit operands and a float32 sum, in a precision that torch's switches do not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from sbs_edge.kernels.plan import wide_sum

__all__ = ["add_product", "full_precision", "mixed_products", "product", "weighted_column_sums"]

# A direct sum of this many terms has no larger error than torch's own, which adds in a tree.
_SUM_ROWS = 16


@lru_cache(maxsize=16)
def _offers(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return hasattr(torch.ops.aten.mm, "dtype_out") and torch.cuda.get_device_capability(device) >= (8, 0)


def mixed_products(device: torch.device) -> bool:
    """Return whether ``device`` multiplies 16-bit operands straight into float32 (sm_80, torch 2.8)."""
    return _offers(device)


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``out = a @ b``, summed in float32 and rounded once, to the type of ``out``."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif mixed_products(out.device):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(_without(a, b))


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``out += a @ b``, with ``out`` in float32."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    elif mixed_products(out.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(_without(a, b))


def _without(a: Tensor, b: Tensor) -> Tensor:
    # On a GPU the 16-bit product costs one more rounding; a CPU emulates it, slower than float32.
    return torch.mm(a, b) if a.is_cuda else torch.mm(a.float(), b.float())


def weighted_column_sums(values: Tensor, factor: Tensor) -> Tensor:
    """Return ``factor @ values`` (V,) for (R, V) values and (R,) factors of one type, in float64 if the device has it.

    The library's matrix-vector product adds the rows one after the other, so its error grows with their
    number. Here it adds only a few rows, and their sums are added in float64.
    """
    n_rows, n_columns = values.shape
    whole = n_rows // _SUM_ROWS * _SUM_ROWS
    kind = wide_sum(values.device, values.dtype)
    sums = torch.zeros(n_columns, dtype=kind, device=values.device)
    if whole:
        blocks = values[:whole].view(-1, _SUM_ROWS, n_columns)
        parts = torch.bmm(factor[:whole].view(-1, 1, _SUM_ROWS), blocks).squeeze(1)
        sums += parts.sum(dim=0, dtype=kind)
    if whole < n_rows:
        sums += torch.mv(values[whole:].t(), factor[whole:])
    return sums


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 in float32 and sum 16-bit products in float32, whatever torch's switches allow.

    ``torch.set_float32_matmul_precision`` and ``allow_tf32`` let the library round float32 operands to
    TF32 (CUDA) or bfloat16 (oneDNN); by default cuBLAS may add the parts of a split sum in 16 bits.
    """
    cuda, mkldnn = torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn)
    changes: list[tuple[Any, str, Any]] = [
        (cuda, f"allow_{kind}_reduced_precision_reduction", False) for kind in ("fp16", "bf16")
    ]
    if hasattr(cuda, "fp32_precision"):
        changes += [(cuda, "fp32_precision", "ieee"), (mkldnn.matmul, "fp32_precision", "ieee")]
    else:  # before torch 2.9
        changes.append((cuda, "allow_tf32", False))
    before = []
    for owner, name, wanted in changes:
        found = getattr(owner, name)
        # "none" also multiplies in float32; a setting that is right already is not changed.
        if found not in (wanted, "none"):
            before.append((owner, name, found))
            setattr(owner, name, wanted)
    try:
        yield
    finally:
        for owner, name, found in before:
            setattr(owner, name, found)
