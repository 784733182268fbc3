"""The registered operators behind :func:`sbs_edge.kernels.cross_entropy.fused_linear_cross_entropy`.

Registered, so that ``torch.compile(fullgraph=True)`` sees one opaque node with known shapes, autocast
leaves it alone, and gradient checkpointing can run it again. All engines share the two operators. The
``torch`` and ``cublas`` engines make the gradients of a unit total in the forward operator and scale them
in the backward one, as does the ``triton`` engine in blocks of rows; over slices of the vocabulary it keeps
two numbers a row and makes them in the backward one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbs_edge.kernels import engines, orders, torch_engine
from sbs_edge.kernels.rows import plan_rows, segment_means

try:
    from torch.fx.experimental.symbolic_shapes import guard_or_false as _guard_or_false
except ImportError:  # before torch 2.8

    def _guard_or_false(a: bool | torch.SymBool) -> bool:
        return bool(a)


__all__ = ["apply"]


def _recomputes(
    engine: str, hidden: Tensor, weight: Tensor, workspace_mb: float, softcap: float, order: str
) -> bool:
    """Whether gradients wait for the backward operator; asked for real and for fake tensors alike."""
    if engines.resolve(engine, hidden.device, hidden.dtype) != "triton":
        return False
    if order:
        return order == "columns"
    least = orders.switch_rows(
        int(weight.shape[0]), int(weight.shape[1]), hidden.dtype.itemsize, weight.dtype.itemsize,
        float(workspace_mb), softcap > 0,
    )  # fmt: skip
    return bool(hidden.shape[0] < least)


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
    order: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, means, counts, correct) and three tensors for the backward operator, empty where unused."""
    plan = plan_rows(targets, valid_indices, segment_ids, row_weights, lambdas, denominators, ignore_index)
    need = (need_hidden, need_weight, need_bias)
    saved: list[Tensor] = [lambdas.new_empty(0) for _ in need]
    # The engine chooses its own precision; autocast would turn its products to 16 bits behind its back.
    with torch.autocast(hidden.device.type, enabled=False):
        name = engines.resolve(engine, hidden.device, hidden.dtype)
        recomputes = _recomputes(engine, hidden, weight, workspace_mb, softcap, order)
        if name == "triton" and (recomputes or not any(need)):
            from sbs_edge.kernels import triton_engine

            options = triton_engine.Options(label_smoothing, z_loss, logit_scale, softcap, workspace_mb)
            tiles = triton_engine.forward(hidden, weight, bias, plan, options)
            losses, hits = tiles.losses, tiles.correct
            if any(need):
                saved[0] = tiles.stats
        else:
            result = _run(name)(
                hidden,
                weight,
                bias,
                plan,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                logit_scale=logit_scale,
                softcap=softcap,
                workspace_mb=workspace_mb,
                need=need,
            )
            losses, hits = result.losses, result.correct
            for position, grad in enumerate((result.grad_hidden, result.grad_weight, result.grad_bias)):
                if grad is not None:
                    saved[position] = grad
    means, correct = segment_means(plan, losses, hits, lambdas.shape[0])
    return ((means * lambdas).sum(), means, plan.counts, correct, *saved)  # type: ignore[return-value]


def _run(engine: str) -> Any:
    if engine == "triton":
        from sbs_edge.kernels import triton_blocks

        return triton_blocks.run
    if engine == "cublas":
        from sbs_edge.kernels.cublas_engine import run_cublas

        return run_cublas
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
    order: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    counts = lambdas.new_empty(lambdas.shape, dtype=torch.int64)
    shapes: list[Any] = [(0,), (0,), (0,)]
    tiles = engines.resolve(engine, hidden.device, hidden.dtype) == "triton"
    kind = lambdas.dtype
    if _recomputes(engine, hidden, weight, workspace_mb, softcap, order):
        if need_hidden or need_weight or need_bias:
            shapes[0] = (2, hidden.shape[0])
    else:
        if tiles and need_hidden and hidden.dtype != torch.float16:
            kind = hidden.dtype
        wholes = (hidden.shape, weight.shape, weight.shape[:1])
        for position, need in enumerate((need_hidden, need_weight, need_bias)):
            if need:
                shapes[position] = wholes[position]
    return (
        lambdas.new_empty(()),
        torch.empty_like(lambdas),
        counts,
        torch.empty_like(counts),
        lambdas.new_empty(shapes[0], dtype=kind),
        lambdas.new_empty(shapes[1]),
        lambdas.new_empty(shapes[2]),
    )


@torch.library.custom_op("sbs_edge::fused_linear_cross_entropy_backward", mutates_args=())
def _gradients(
    grad_total: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    workspace_mb: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that ``need_*`` names, in their tensors' types, by the triton engine; else empty."""
    from sbs_edge.kernels import triton_engine

    plan = plan_rows(targets, valid_indices, segment_ids, row_weights, lambdas, denominators, ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        grads = triton_engine.backward(
            grad_total,
            hidden,
            weight,
            bias,
            plan,
            stats,
            triton_engine.Options(label_smoothing, z_loss, logit_scale, softcap, workspace_mb),
            (need_hidden, need_weight, need_bias),
        )
    made = [lambdas.new_empty(0) if grad is None else grad for grad in grads]
    return made[0], made[1], made[2]


@_gradients.register_fake
def _(
    grad_total: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    workspace_mb: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = lambdas.new_empty(0)
    return (
        hidden.new_empty(hidden.shape) if need_hidden else nothing,
        weight.new_empty(weight.shape) if need_weight else torch.empty_like(nothing),
        bias.new_empty(bias.shape) if need_bias and bias is not None else torch.empty_like(nothing),
    )


N_INPUTS = 20
N_TENSORS = 9
N_OUTPUTS = 4


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias = inputs[:3]
    ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    ctx.need = inputs[-3:]
    ctx.options = inputs[N_TENSORS:-5]
    softcap, workspace_mb, engine, order = inputs[-7:-3]
    ctx.recompute = _recomputes(engine, hidden, weight, workspace_mb, softcap, order)
    if ctx.recompute:
        ctx.save_for_backward(*inputs[:N_TENSORS], output[N_OUTPUTS])
    else:
        ctx.save_for_backward(*output[N_OUTPUTS:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _graph_ends_here(grad_total: Tensor) -> bool:
    """Whether nobody can ask for the saved gradients again, so that they may be scaled where they are.

    They were never handed out, and a graph that autograd is about to free is not walked twice. With
    ``retain_graph``, gradients of gradients, a compiler or ``vmap`` at work, they are copied instead.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    batched = "Batched" in str(torch._C._dispatch_keys(grad_total))  # not every vmap's key has a name here
    return type(grad_total) is Tensor and not batched and not keeps()


def _scaled(saved: Tensor, grad_total: Tensor) -> Tensor:
    """``saved`` times the total's gradient, in place; on a CPU a factor of one costs no pass."""
    if grad_total.device.type == "cpu" and grad_total == 1.0:
        return saved
    return saved.mul_(grad_total)


def _backward(ctx: Any, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * N_INPUTS
    if grad_total is None or not any(ctx.need):
        return tuple(grads)
    if ctx.recompute:
        made = _gradients(grad_total, *ctx.saved_tensors, *ctx.options, *ctx.need)
        for position, need in enumerate(ctx.need):
            if need:
                grads[position] = made[position]
        return tuple(grads)
    owned = _graph_ends_here(grad_total)
    for position, (saved, dtype, need) in enumerate(
        zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True)
    ):
        if need:
            # Scaled in the accumulator's precision, then rounded once: exact for any loss scale.
            grads[position] = (_scaled(saved, grad_total) if owned else saved * grad_total).to(dtype)
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
        # A compiler that learns the number of rows at run time only cannot weigh them against the classes.
        orders.asked() or ("" if _guard_or_false(hidden.shape[0] > 1) else "columns"),
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
        recording and bias is not None and bias.requires_grad,
    )
    return out[0], out[1], out[2], out[3]
