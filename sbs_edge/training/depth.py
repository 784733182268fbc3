"""Shallower students: a student that starts from some of a checkpoint's layers. Imports no torch.

The layers kept become layers 0, 1, ... of an ordinary checkpoint. Copying evenly spaced layers and training on is
the "shrink and fine-tune" of Shleifer and Rush (arXiv 2010.13002). The decoder's depth decides the time of a
rationale and the encoder's that of a label (NASH, arXiv 2310.10054).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import TypeVar

from sbs_edge.errors import UsageError

__all__ = ["Layers", "kept_layers", "kept_tensors", "parse_layers"]

Layers = str | int | tuple[int, ...]
"""A number of layers, or the indices of the layers to keep; as text ``"2"`` or ``"0,3,5"``."""

T = TypeVar("T")
_STACKS = ("encoder", "decoder")
_BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"


def parse_layers(given: Layers) -> int | tuple[int, ...]:
    """Return a number of layers, or the indices of layers in ascending order.

    Args:
        given: ``2`` or ``"2"`` is a number of layers; ``(0, 3, 5)`` or ``"0,3,5"`` are indices, and so is ``"5,"``.

    Raises:
        ValueError: it is neither; the message does not name the field.

    Example:
        >>> parse_layers("2"), parse_layers("0,3,5")
        (2, (0, 3, 5))

    """
    text = (
        given
        if isinstance(given, str)
        else ",".join(map(str, given))
        if isinstance(given, tuple)
        else str(given)
    )
    parts = [part.strip() for part in text.split(",")]
    as_list = isinstance(given, tuple) or len(parts) > 1
    if as_list and parts[-1] == "":
        parts.pop()
    if not parts or not all(re.fullmatch(r"\d{1,4}", part, re.ASCII) for part in parts):
        raise ValueError(
            f"{text!r} is neither a number of layers, such as 2, nor indices of layers, such as 0,3,5"
        )
    numbers = tuple(map(int, parts))
    if not as_list:
        if numbers[0] < 1:
            raise ValueError("a student has at least 1 layer")
        return numbers[0]
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise ValueError(
            f"the indices {text} must ascend, each once: a student keeps the order of its layers"
        )
    return numbers


def kept_layers(given: Layers | None, there: int, stack: str) -> tuple[int, ...]:
    """Return the indices of the layers to keep of ``there`` layers.

    A number of layers is spread evenly, with the first and the last kept; a single one is the first.

    Args:
        given: see :func:`parse_layers`; None keeps every layer.
        there: layers that the checkpoint has.
        stack: ``encoder`` or ``decoder``, for the message.

    Raises:
        UsageError: the checkpoint does not have these layers.

    Example:
        >>> kept_layers("3", 6, "encoder"), kept_layers("0,4", 6, "decoder")
        ((0, 3, 5), (0, 4))

    """
    if given is None:
        return tuple(range(there))
    wanted = parse_layers(given)
    most = wanted if isinstance(wanted, int) else wanted[-1] + 1
    if most > there:
        asked = f"{wanted} of them" if isinstance(wanted, int) else f"layer {wanted[-1]}, counted from 0"
        raise UsageError(
            f"The checkpoint's {stack} has {there} layer{'s' * (there > 1)}, and {stack}_layers asks for {asked}. Give a "
            f"number from 1 to {there}, or indices from 0 to {there - 1}."
        )
    if isinstance(wanted, tuple):
        return wanted
    gaps = wanted - 1
    return (0,) if gaps == 0 else tuple((2 * i * (there - 1) + gaps) // (2 * gaps) for i in range(wanted))


def kept_tensors(tensors: Mapping[str, T], kept: Mapping[str, tuple[int, ...]]) -> dict[str, T]:
    """Return the tensors of the layers kept, under the names they have in the shallower model.

    T5 and mT5 have one table of position biases a stack, in layer 0, and it serves every layer: it stays in the new
    layer 0. UMT5 has a table in every layer, which goes with its layer.

    Args:
        tensors: name -> tensor of the whole model, as in its files.
        kept: ``encoder`` and ``decoder`` -> indices of the layers kept, ascending.

    """
    found: dict[str, T] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.(.+)", name)
        if match is None:
            found[name] = tensor
            continue
        stack, layer, rest = match[1], int(match[2]), match[3]
        if layer in kept[stack]:
            found[f"{stack}.block.{kept[stack].index(layer)}.{rest}"] = tensor
    for stack in _STACKS:
        first = f"{stack}.block.0.{_BIAS}"
        if first in tensors:
            found.setdefault(first, tensors[first])
    return found
