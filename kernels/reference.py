"""The loss written plainly, with full logits and PyTorch's own gradients: what the engines are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

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
    logits = hidden[valid] @ weight.t().to(hidden.dtype)
    logits = logits * logit_scale
    if bias is not None:
        logits = logits + bias.to(hidden.dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    # Less the largest logit before anything is subtracted: logsumexp less a confident target's is mostly rounding.
    shares = torch.log_softmax(logits, dim=1)
    losses = (label_smoothing - 1) * shares.gather(1, kept.unsqueeze(1)).squeeze(1)
    if label_smoothing:  # apart: a class banned by a bias of -inf must not make 0 * -inf
        losses = losses - label_smoothing * shares.mean(dim=1)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(logits, dim=1) ** 2
    weights = torch.ones_like(losses) if row_weights is None else row_weights[valid].to(losses.dtype)
    hits = logits.argmax(dim=1) == kept
    means, counts, correct = [], [], []
    for k in range(lambdas.shape[0]):
        member = segments == k
        divisor = weights[member].sum() if denominators is None else denominators[k]
        share = (losses[member] * weights[member]).sum()
        if divisor == 0 or not member.any():
            means.append(share * 0.0)
        else:
            means.append(share / (divisor if 0 < divisor < torch.inf else torch.nan))
        counts.append(member.sum())
        correct.append((hits & member).sum())
    stacked = torch.stack(means)
    total = (stacked * lambdas.to(stacked.dtype)).sum()
    return total, stacked.detach(), torch.stack(counts), torch.stack(correct)
