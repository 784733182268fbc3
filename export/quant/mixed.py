"""Quantise some layers and keep others in float32.

A layer is ``encoder.block.N``, ``decoder.block.N``, ``lm_head`` or ``shared`` (the embedding).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from sbs_edge.errors import UsageError
from sbs_edge.export.graphs.builder import Graph, Value
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Float32, Precision

__all__ = ["Mixed", "check_layers", "layers_of"]

HEAD, EMBEDDING = "lm_head", "shared"


def layers_of(weights: T5Weights) -> list[str]:
    """Return the names of all layers."""
    return [
        EMBEDDING,
        *(f"encoder.block.{i}" for i in range(weights.n_encoder_layers)),
        *(f"decoder.block.{i}" for i in range(weights.n_decoder_layers)),
        HEAD,
    ]


def check_layers(weights: T5Weights, keep: Collection[str]) -> None:
    """Raise :class:`UsageError` if ``keep`` names a layer that does not exist."""
    known = layers_of(weights)
    unknown = [name for name in keep if name not in known]
    if unknown:
        raise UsageError(
            f"There is no layer {unknown[0]!r} to keep in float32; the student's layers are {', '.join(known)}."
        )


class Mixed:
    """Another precision, except for the layers ``keep``."""

    def __init__(self, base: Precision, weights: T5Weights, keep: Collection[str]) -> None:
        """Remember the memory address of every weight, because a graph's blocks pass arrays, not names."""
        self.base = base
        self.keep = frozenset(keep)
        self.contrib = base.contrib
        self._float = Float32(contrib=base.contrib)
        self._place = {
            array.__array_interface__["data"][0]: name
            for name, array in weights.arrays.items()
            if array.ndim == 2
        }

    def _layer(self, weight: np.ndarray, norm: str | None, site: str | None) -> str | None:
        """Return the layer of a product, by its weight or, for a computed weight, by the norm before it."""
        name = site or self._place.get(weight.__array_interface__["data"][0]) or norm
        if name is None:
            return None
        if name.startswith(("lm_head", "shared", "decoder.final_layer_norm")):
            return HEAD
        return ".".join(name.split(".")[:3])

    def linear(
        self, graph: Graph, x: Value, weight: np.ndarray, *, norm: str | None, site: str | None = None,
        relu: bool = False,
    ) -> Value:  # fmt: skip
        """See :class:`sbs_edge.export.quant.precision.Precision`."""
        chosen = self._float if self._layer(weight, norm, site) in self.keep else self.base
        return chosen.linear(graph, x, weight, norm=norm, site=site, relu=relu)

    def embedding(self, graph: Graph, weight: np.ndarray, ids: Value) -> Value:
        """See :class:`sbs_edge.export.quant.precision.Precision`."""
        chosen = self._float if EMBEDDING in self.keep else self.base
        return chosen.embedding(graph, weight, ids)

    def tied_head(
        self, graph: Graph, x: Value, table: np.ndarray, scale: float, *, norm: str
    ) -> Value | None:
        """See :class:`sbs_edge.export.quant.precision.Precision`; a table in two formats is stored twice."""
        kept = self.keep & {EMBEDDING, HEAD}
        if len(kept) == 1:
            return None
        return (self._float if kept else self.base).tied_head(graph, x, table, scale, norm=norm)
