"""Fused linear + cross-entropy over task segments, the public operation of this folder.

For hidden states h_i (N, D), a head weight W (V, D), targets t_i and segments k(i), with
``z_i = softcap(logit_scale * (W h_i) + b)`` and ``lse_i = logsumexp(z_i)``::

    ce_i   = (1 - eps) * (lse_i - z_i[t_i]) + eps * (lse_i - mean_v z_i[v]) + z_loss * lse_i^2
    loss_k = sum_{i in k} r_i ce_i / d_k        d_k = sum_{i in k} r_i, or the given `denominators`
    total  = sum_k lambda_k loss_k

This is the objective of *Distilling Step-by-Step* (Hsieh et al. 2023, eq. 3) if segment 0 has the
label rows, segment 1 the rationale rows, and ``segment_weights = (1, lambda)``. Logits of all rows are
never stored at once. Rows whose target is ``ignore_index`` are left out before any matrix product. This module
knows nothing of tasks, files or transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sbs_edge.kernels import op
from sbs_edge.kernels.engines import EngineStatus, available_engines, select_engine
from sbs_edge.kernels.plan import Inputs, Options
from sbs_edge.kernels.reference import reference_loss

__all__ = ["EngineStatus", "FusedLoss", "available_engines", "fused_linear_cross_entropy", "select_engine"]


class FusedLoss(NamedTuple):
    """The loss of a call; only ``total`` has a gradient.

    Attributes:
        total: () float32 (float64 for float64 input), ``sum_k lambda_k losses[k]``.
        losses: (K,) mean loss of every segment in nats per token; 0 for a segment without a valid row.
        counts: (K,) int64, valid rows.
        correct: (K,) int64, valid rows whose largest logit is the target's; -1 if they are not counted.
    """

    total: Tensor
    losses: Tensor
    counts: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> Tensor:
        """Return the (K,) share of correct rows: 0 for a segment without a valid row, NaN if they are not counted."""
        share = self.correct / self.counts.clamp(min=1)
        return share.masked_fill(self.correct < 0, math.nan)


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
    n_segments: int = 1,
    segment_weights: Sequence[float] | Tensor | None = None,
    row_weights: Tensor | None = None,
    valid_indices: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    denominators: Tensor | None = None,
    workspace_mb: float | None = None,
    engine: str = "auto",
    count_correct: bool = True,
    debug: bool = False,
) -> FusedLoss:
    """Return the weighted sum of the segments' mean cross-entropies, without materialising logits.

    A row of weight 0, or of a segment whose factor or denominator is 0, contributes nothing to
    the total or to a gradient, even if its state is NaN. Float32 inputs are multiplied in float32,
    whatever ``torch.set_float32_matmul_precision`` allows.

    Args:
        hidden: (N, D) hidden states, any floating dtype and strides; N may be 0.
        weight: (V, D) head weight; may be the (tied) embedding. Sharded tensors are refused.
        targets: (N,) integer class of each row, or ``ignore_index``.
        bias: (V,) optional; added to the scaled logits, before the cap.
        segment_ids: (N,) segment of each row in ``[0, n_segments)``; None: all rows are segment 0.
        n_segments: K >= 1.
        segment_weights: K factors lambda_k; None: all 1. No gradient flows into them.
        row_weights: (N,) non-negative factors r_i; None: all 1. No gradient flows into them. A NaN
            weight gives its segment a NaN loss.
        valid_indices: (M,) the rows whose target is not ``ignore_index``, if the collator knows
            them; this avoids the device synchronisation of finding them here.
        ignore_index: target of rows to leave out.
        label_smoothing: eps in [0, 1).
        z_loss: weight of ``lse^2`` (PaLM, Chowdhery et al. 2022, section 5).
        logit_scale: factor on the logits, D ** -0.5 for T5's tied decoders; applied in the
            accumulator's precision.
        softcap: c > 0 gives ``z = c * tanh(z / c)``; 0 switches it off.
        denominators: (K,) replaces the local sums of row weights: under data parallelism the sums
            over all ranks divided by the number of ranks make means global, not means of means. A
            segment whose value is 0 contributes 0; a negative or not finite one makes its loss NaN.
        workspace_mb: limit of the temporary buffers, in MiB; None: chosen by the engine.
        engine: ``auto``, ``triton``, ``cublas``, ``torch`` or ``reference``.
        count_correct: whether to count the rows whose largest logit is the target's; False saves a GPU
            the second check of rows that are nearly a hit.
        debug: check targets, segments and values first, and name the first bad row or segment; costs a
            synchronisation on a GPU. Without it an out-of-range target gives NaN, never a silently
            wrong number.

    Returns:
        See :class:`FusedLoss`. Gradients reach ``hidden``, ``weight`` and ``bias`` if they require
        one; a frozen tensor costs nothing.

    Raises:
        ValueError: shapes, dtypes or options do not fit; in debug mode, a bad row or segment.
        TypeError: the weight is sharded.
        RuntimeError: the engine asked for does not work here.
        NotImplementedError: ``torch.func`` transforms, forward-mode derivatives, or a gradient of the
            gradient (raised when it is taken). Engine ``reference`` has them.

    Example:
        >>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
        >>> targets = torch.tensor([3, 0, -100, 19, 7, -100])
        >>> loss = fused_linear_cross_entropy(hidden, weight, targets)
        >>> loss.total.backward()
        >>> loss.counts, hidden.grad.shape, weight.grad.shape
        (tensor([4]), torch.Size([6, 8]), torch.Size([20, 8]))
    """
    _check(
        hidden, weight, targets, bias, segment_ids, n_segments, row_weights, denominators, label_smoothing, softcap
    )  # fmt: skip
    targets = targets.long()  # a narrow type need not hold ignore_index
    if (
        not 0.0 < abs(logit_scale) < math.inf
    ):  # compiled with dynamic shapes it is not a float, so isfinite does not work
        raise ValueError(f"logit_scale must be a finite number other than 0, not {logit_scale}.")
    if workspace_mb is not None and workspace_mb <= 0:
        raise ValueError(f"workspace_mb must be positive, or None to have it planned, not {workspace_mb}.")
    if engine != "reference":
        _refuse_transforms((hidden, weight, bias))
    if debug and hidden.device.type != "meta":  # which has no values
        _check_values(
            hidden,
            targets,
            segment_ids,
            row_weights,
            valid_indices,
            denominators,
            n_segments,
            weight.shape[0],
            ignore_index,
        )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    device = hidden.device
    lambdas = _lambdas(segment_weights, n_segments, dtype, device)
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        low = torch.get_autocast_dtype(device.type)
        if hidden.dtype == torch.float32:
            hidden = hidden.to(low)
    if engine == "reference":
        total, losses, counts, correct = reference_loss(
            hidden, weight, targets, bias=bias, segment_ids=segment_ids, lambdas=lambdas,
            row_weights=row_weights, denominators=denominators, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, logit_scale=logit_scale, softcap=softcap,
        )  # fmt: skip
    else:
        options = Options(label_smoothing, z_loss, logit_scale, softcap, workspace_mb or 0.0, count_correct)
        total, losses, counts, correct = op.apply(
            Inputs(hidden, weight, bias), targets, valid_indices, segment_ids, row_weights, lambdas, denominators,
            ignore_index, options, engine,
        )  # fmt: skip
    return FusedLoss(total, losses, counts, correct if count_correct else torch.full_like(correct, -1))


def _refuse_transforms(tensors: tuple[Tensor | None, ...]) -> None:
    """Raise an error if the operator would drop a derivative or a batch dimension."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
        if dual or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise NotImplementedError(
                "fused_linear_cross_entropy has first derivatives in reverse mode only: torch.func transforms "
                "(grad, vmap, jvp, jacrev, hessian) and forward-mode derivatives do not work on it. Use "
                "torch.autograd.grad, or engine='reference', which holds full logits."
            )


def _lambdas(
    values: Sequence[float] | Tensor | None, n_segments: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if isinstance(values, Tensor):
        lambdas = values.detach().to(device=device, dtype=dtype)
    else:
        numbers = [1.0] * n_segments if values is None else values
        if len(set(numbers)) == 1:
            lambdas = torch.full((len(numbers),), float(numbers[0]), dtype=dtype, device=device)
        elif device.type == "cpu":
            lambdas = torch.tensor([float(v) for v in numbers], dtype=dtype)
        else:  # filled on the device: copying a list would wait for all of the device's work
            lambdas = torch.stack([torch.full((), float(v), dtype=dtype, device=device) for v in numbers])
    if lambdas.shape != (n_segments,):
        raise ValueError(f"segment_weights must hold {n_segments} values, not {tuple(lambdas.shape)}.")
    return lambdas


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    segment_ids: Tensor | None,
    n_segments: int,
    row_weights: Tensor | None,
    denominators: Tensor | None,
    label_smoothing: float,
    softcap: float,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, D) and weight (V, D) with the same D; got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}. An empty weight is a parameter that its owner sharded away: gather it "
            "first (FSDP: call inside the wrapped module's forward; ZeRO-3: GatheredParameters)."
        )
    for name, sharded in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if type(sharded).__name__ == "DTensor" or hasattr(sharded, "device_mesh"):
            raise TypeError(
                f"{name} is a sharded DTensor. Call this operation inside the forward of the module that FSDP "
                f"wrapped, where its parameters are whole, or pass {name}.full_tensor()."
            )
    n = hidden.shape[0]
    for name, tensor, size in (
        ("targets", targets, n), ("segment_ids", segment_ids, n), ("row_weights", row_weights, n),
        ("bias", bias, weight.shape[0]), ("denominators", denominators, n_segments),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), not {tuple(tensor.shape)}.")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, not {targets.dtype}.")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, not {hidden.dtype}.")
    if n_segments < 1:
        raise ValueError(f"n_segments must be at least 1, not {n_segments}.")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), not {label_smoothing}.")
    if softcap < 0.0:
        raise ValueError(f"softcap must be positive, or 0 for none, not {softcap}.")


def _check_values(
    hidden: Tensor,
    targets: Tensor,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    valid_indices: Tensor | None,
    denominators: Tensor | None,
    n_segments: int,
    n_classes: int,
    ignore_index: int,
) -> None:
    valid = targets != ignore_index
    problems = [
        ("its target is outside [0, V)", valid & ((targets < 0) | (targets >= n_classes))),
        ("its hidden state is not finite", valid & ~torch.isfinite(hidden).all(dim=1)),
    ]
    if segment_ids is not None:
        problems.append(
            (
                "its segment is outside [0, n_segments)",
                valid & ((segment_ids < 0) | (segment_ids >= n_segments)),
            )
        )
    if row_weights is not None:
        problems.append(
            (
                "its row weight is negative or not finite",
                valid & ~((row_weights >= 0) & torch.isfinite(row_weights)),
            )
        )
    if denominators is not None:
        wrong = ~((denominators >= 0) & torch.isfinite(denominators))
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"Segment {first} is bad: its denominator is negative or not finite ({denominators[first].item()}); "
                f"{int(wrong.sum())} such segment(s)."
            )
    if valid_indices is not None:
        given = valid_indices.sort().values
        if not torch.equal(given, valid.nonzero().squeeze(1).to(given.dtype)):
            raise ValueError(
                "valid_indices must be the rows whose target is not ignore_index; it is another set."
            )
    for what, bad in problems:
        rows = bad.nonzero()
        if len(rows):
            row = int(rows[0])
            raise ValueError(
                f"Row {row} is bad: {what} (target {int(targets[row])}, V = {n_classes}); "
                f"{len(rows)} such row(s)."
            )
