"""A T5-family checkpoint as plain arrays: T5, v1.1, FLAN, mT5, UMT5, ByT5, tied or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sbs_edge.errors import UsageError
from sbs_edge.tokens import start_token_id

__all__ = ["T5Weights", "weights_of"]

ACTIVATIONS = ("relu", "gelu_new", "gelu", "silu")


@dataclass(frozen=True)
class T5Weights:
    """Shapes and arrays of a checkpoint.

    Attributes:
        arrays: float32 by state-dict name; linear weights are (out, in), as in torch.
        head: (V, d_model) float32 weight of the LM head.
        logit_scale: factor between decoder output and head, d_model ** -0.5 or 1, measured on the model.
    """

    family: str
    d_model: int
    d_kv: int
    d_ff: int
    n_heads: int
    n_encoder_layers: int
    n_decoder_layers: int
    n_buckets: int
    max_distance: int
    epsilon: float
    activation: str
    gated: bool
    vocab_size: int
    start_id: int
    eos_id: int
    pad_id: int
    logit_scale: float
    arrays: dict[str, np.ndarray]
    head: np.ndarray

    @property
    def inner(self) -> int:
        """Return the width of all heads together, which is not always ``d_model``."""
        return self.n_heads * self.d_kv

    @property
    def embedding(self) -> np.ndarray:
        """(V, d_model) input embedding."""
        return self.arrays["shared.weight"]

    def linear(self, name: str) -> np.ndarray:
        """Return the weight ``name`` as (in, out), for multiplication from the right."""
        return self.arrays[name + ".weight"].T

    def vector(self, name: str) -> np.ndarray:
        """Return the weight ``name`` as it is."""
        return self.arrays[name + ".weight"]

    def describe(self) -> dict[str, Any]:
        """Return the shapes for the manifest."""
        return {
            "family": self.family, "d_model": self.d_model, "d_kv": self.d_kv, "d_ff": self.d_ff,
            "n_heads": self.n_heads, "n_encoder_layers": self.n_encoder_layers,
            "n_decoder_layers": self.n_decoder_layers, "vocab_size": self.vocab_size,
            "activation": self.activation, "gated": self.gated, "decoder_start_token_id": self.start_id,
            "eos_token_id": self.eos_id, "pad_token_id": self.pad_id, "logit_scale": self.logit_scale,
            "parameters": self.parameters,
        }  # fmt: skip

    @property
    def tied(self) -> bool:
        """Return whether the LM head is the embedding."""
        return np.shares_memory(self.head, self.embedding) or np.array_equal(self.head, self.embedding)

    @property
    def parameters(self) -> int:
        """Return the number of distinct parameters."""
        tied = self.tied
        own = sum(a.size for name, a in self.arrays.items() if name not in ("lm_head.weight",)
                  and not name.endswith("embed_tokens.weight"))  # fmt: skip
        return own + (0 if tied else self.head.size)


def weights_of(model: Any) -> T5Weights:
    """Return shapes and arrays of a transformers model (on CPU, any floating dtype)."""
    from sbs_edge.training.model import measure_logit_scale

    config = model.config
    arrays = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UsageError(
                f"The checkpoint's tensor {name} has numbers that are not finite, so its answers cannot be trusted. "
                "Either training diverged or the file is damaged: train again, or copy it again."
            )
    activation = config.dense_act_fn
    if activation not in ACTIVATIONS:
        raise UsageError(
            f"The checkpoint's activation {activation!r} is not supported; the supported ones are {', '.join(ACTIVATIONS)}."
        )
    return T5Weights(
        family=config.model_type,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        n_heads=config.num_heads,
        n_encoder_layers=config.num_layers,
        n_decoder_layers=config.num_decoder_layers,
        n_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
        epsilon=config.layer_norm_epsilon,
        activation=activation,
        gated=bool(config.is_gated_act),
        vocab_size=arrays["shared.weight"].shape[0],
        start_id=start_token_id(config),
        eos_id=config.eos_token_id,
        pad_id=config.pad_token_id,
        logit_scale=measure_logit_scale(model),
        arrays=arrays,
        head=model.get_output_embeddings().weight.detach().float().numpy(),
    )
