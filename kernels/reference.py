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
    lse = torch.logsumexp(logits, dim=1)
    picked = logits.gather(1, kept.unsqueeze(1)).squeeze(1)
    losses = lse - (1 - label_smoothing) * picked + z_loss * lse**2
    if label_smoothing:  # apart: a class banned by a bias of -inf must not make 0 * -inf
        losses = losses - label_smoothing * logits.mean(dim=1)
    weights = torch.ones_like(losses) if row_weights is None else row_weights[valid].to(losses.dtype)
    hits = logits.argmax(dim=1) == kept
    means, counts, correct = [], [], []
    for k in range(lambdas.shape[0]):
        member = segments == k
        divisor = weights[member].sum() if denominators is None else denominators[k]
        share = (losses[member] * weights[member]).sum()
        means.append(share / divisor if divisor > 0 else share * 0.0)
        counts.append(member.sum())
        correct.append((hits & member).sum())
    stacked = torch.stack(means)
    total = (stacked * lambdas.to(stacked.dtype)).sum()
    return total, stacked.detach(), torch.stack(counts), torch.stack(correct)
