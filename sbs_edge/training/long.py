"""Training on long inputs with bounded memory.

The encoder reads chunks in groups. After each group only its states are held; in the backward pass, once the decoder's
gradients of the states are known, a group is computed again with the same dropout and its gradients added up. This is
the method of CachED (Saxena et al., 2025); ``torch.utils.checkpoint`` does it, a group at a time. The gradients are
those of plain back-propagation through all chunks.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sbs_edge.windows import Chunk

__all__ = ["bound_memory", "chunk_tensors", "draw_states", "encode_chunks"]

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
GROUP_TOKENS = 2048
"""Most padded tokens that pass through the encoder at once; at least one chunk does."""


def chunk_tensors(documents: Sequence[Sequence[Chunk]], pad_id: int) -> dict[str, Tensor]:
    """Return the tensors of documents that are read in chunks.

    Returns:
        ``input_ids`` and ``attention_mask``, (C, S) int64, the chunks of all B documents one after the other, and
        ``state_index`` (B, N) int64: places of the kept states in the C * S states of the chunks, in order; -1 where
        a document has fewer than N.

    """
    chunks = [chunk for document in documents for chunk in document]
    width = max(len(chunk.ids) for chunk in chunks)
    ids = torch.full((len(chunks), width), pad_id)
    lengths = torch.tensor([len(chunk.ids) for chunk in chunks])
    places: list[Tensor] = []
    number = 0
    for document in documents:
        kept = []
        for chunk in document:
            ids[number, : len(chunk.ids)] = torch.tensor(chunk.ids)
            kept.append(torch.arange(chunk.start, chunk.stop) + number * width)
            number += 1
        places.append(torch.cat(kept))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(width) < lengths.unsqueeze(1)).long(),
        "state_index": torch.nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1),
    }


def draw_states(index: Tensor, count: int) -> Tensor:
    """Draw ``count`` kept states of every document that has more, without replacement, in their order.

    Args:
        index: (B, N) places of states, -1 where there is none.
        count: how many a document keeps.

    Returns:
        (B, min(N, count)) places, -1 where there is none.

    """
    if index.shape[1] <= count:
        return index
    lots = torch.rand(index.shape, device=index.device).masked_fill(index < 0, 2.0)
    drawn = lots.topk(count, dim=1, largest=False).indices.sort(dim=1).values
    return index.gather(1, drawn)


def encode_chunks(
    encode: Callable[[Tensor, Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    """Encode chunks in groups and gather the states that are kept.

    Args:
        encode: ids and mask (G, S) -> states (G, S, D).
        input_ids: (C, S).
        attention_mask: (C, S).
        index: (B, N) places of the states to gather, -1 where there is none.

    Returns:
        States (B, N, D) and their mask (B, N) int64.

    """
    size = max(1, GROUP_TOKENS // input_ids.shape[1])
    parts = []
    for start in range(0, len(input_ids), size):
        group = input_ids[start : start + size], attention_mask[start : start + size]
        # The state of the random numbers is kept, so that dropout is the same when the group is computed again.
        parts.append(
            checkpoint(encode, *group, use_reentrant=False) if torch.is_grad_enabled() else encode(*group)
        )
    states = torch.cat(parts).flatten(0, 1)
    return states[index.clamp(min=0)], (index >= 0).long()


def bound_memory(student: Any) -> None:
    """Keep only the inputs of the decoder's blocks, whose keys and values grow with the input, a layer each.

    Blocks of memory from a megabyte on are given back as soon as they are free: in glibc's heap the gaps between them
    would add up to hundreds of megabytes.

    Args:
        student: a T5-family model of transformers.

    """
    enable = getattr(student, "activation_checkpointing_enable", student.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for module in student.get_encoder().modules():  # its groups are computed again as a whole
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
