"""The loss with full logits and PyTorch's own gradients, as a reference for the engines."""

from __future__ import annotations

import torch
from torch import Tensor

from sbs_edge.kernels.plan import dead_rows

__all__ = ["reference_loss"]


def reference_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    segment_ids: Tensor | None = None,
    lambdas: Tensor,
    row_weights: Tensor | None = None,
    denominators: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (total, (K,) losses, (K,) counts, (K,) correct) in the precision of the inputs."""
    valid = (targets != ignore_index).nonzero().squeeze(1)
    kept = targets[valid]
    segments = torch.zeros_like(kept) if segment_ids is None else segment_ids[valid].long()
    weights = torch.ones(kept.shape, dtype=hidden.dtype, device=kept.device)
    if row_weights is not None:
        weights = row_weights[valid].to(hidden.dtype)

    def rows(states: Tensor) -> tuple[Tensor, Tensor]:
        """Return (M,) losses and hits of (M, D) states."""
        logits = states @ weight.t().to(hidden.dtype)
        logits = logits * logit_scale
        if bias is not None:
            logits = logits + bias.to(hidden.dtype)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        # Subtract the largest logit first: logsumexp minus a confident target's logit would be mostly rounding.
        shares = torch.log_softmax(logits, dim=1)
        losses = (label_smoothing - 1) * shares.gather(1, kept.unsqueeze(1)).squeeze(1)
        if label_smoothing:  # apart: a class banned by a bias of -inf must not make 0 * -inf
            losses = losses - label_smoothing * shares.mean(dim=1)
        if z_loss:
            losses = losses + z_loss * torch.logsumexp(logits, dim=1) ** 2
        return losses, logits.argmax(dim=1) == kept

    states, factors = hidden[valid], lambdas.to(hidden.dtype)
    divisors = [
        weights[segments == k].sum() if denominators is None else denominators[k].to(hidden.dtype)
        for k in range(len(lambdas))
    ]
    # 0 contributes nothing; a negative or not finite value gives NaN.
    divisor = torch.stack([d if 0 <= d < torch.inf else d * torch.nan for d in divisors])
    share = weights.masked_fill(dead_rows(divisor)[segments], 0.0)
    dead = dead_rows(share * factors[segments])
    if dead.any():  # their losses are reported, but must not reach a gradient, where 0 * NaN is NaN
        losses, _ = rows(states.masked_fill(dead.unsqueeze(1), 0.0))
        with torch.no_grad():
            reported, hits = rows(states)
        losses = torch.where(dead, reported, losses)
    else:
        losses, hits = rows(states)
    shares = (losses * share).masked_fill(dead_rows(share), 0.0)
    means, counts, correct = [], [], []
    for k in range(len(lambdas)):
        member = segments == k
        means.append(shares[member].sum() / divisor[k].masked_fill(dead_rows(divisor[k]), 1.0))
        counts.append(member.sum())
        correct.append((hits & member).sum())
    stacked = torch.stack(means)
    total = (stacked * factors).masked_fill(dead_rows(factors), 0.0).sum()
    return total, stacked.detach(), torch.stack(counts), torch.stack(correct)
