"""The registered operators behind :func:`sbs_edge.kernels.cross_entropy.fused_linear_cross_entropy`.

Registered, so that ``torch.compile(fullgraph=True)`` sees one opaque node with known shapes, autocast
leaves it alone, and gradient checkpointing can run it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbs_edge.kernels import torch_engine
from sbs_edge.kernels.rows import plan_rows, segment_means

__all__ = ["apply"]


@torch.library.custom_op("sbs_edge::fused_linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    workspace_mb: float,
    engine: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = plan_rows(targets, valid_indices, segment_ids, row_weights, lambdas, denominators, ignore_index)
    # The engine chooses its own precision; autocast would turn its products to 16 bits behind its back.
    with torch.autocast(hidden.device.type, enabled=False):
        result = _run(engine)(
            hidden,
            weight,
            bias,
            plan,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_scale=logit_scale,
            softcap=softcap,
            workspace_mb=workspace_mb,
            need=(need_hidden, need_weight, need_bias),
        )
    means, correct = segment_means(plan, result.losses, result.correct, lambdas.shape[0])
    nothing = lambdas.new_empty(0)
    return (
        (means * lambdas).sum(),
        means,
        plan.counts,
        correct,
        nothing if result.grad_hidden is None else result.grad_hidden,
        nothing.clone() if result.grad_weight is None else result.grad_weight,
        nothing.clone() if result.grad_bias is None else result.grad_bias,
    )


def _run(engine: str) -> Any:
    if engine == "cublas":
        from sbs_edge.kernels.triton_engine import run_cublas

        return run_cublas
    if engine != "torch":
        raise RuntimeError(f"This version ships no {engine!r} engine.")
    return torch_engine.run


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    workspace_mb: float,
    engine: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    counts = lambdas.new_empty(lambdas.shape, dtype=torch.int64)
    return (
        lambdas.new_empty(()),
        torch.empty_like(lambdas),
        counts,
        torch.empty_like(counts),
        lambdas.new_empty(hidden.shape if need_hidden else (0,)),
        lambdas.new_empty(weight.shape if need_weight else (0,)),
        lambdas.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.need = inputs[-3:]
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 19
    if grad_total is not None:
        for position, (saved, dtype, need) in enumerate(
            zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True)
        ):
            if need:
                # Scaled in the accumulator's precision, then rounded once: exact for any loss scale.
                grads[position] = (saved * grad_total).to(dtype)
    return tuple(grads)


_forward.register_autograd(_backward, setup_context=_setup_context)


def apply(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    workspace_mb: float,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator of ``engine``; gradients are made only where autograd asks for them."""
    recording = torch.is_grad_enabled()
    out = _forward(
        hidden,
        weight,
        bias,
        targets,
        valid_indices,
        segment_ids,
        row_weights,
        lambdas,
        denominators,
        ignore_index,
        label_smoothing,
        z_loss,
        logit_scale,
        softcap,
        workspace_mb,
        engine,
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
        recording and bias is not None and bias.requires_grad,
    )
    return out[0], out[1], out[2], out[3]
