"""Tiny random students of every family, and a way to run a graph that is not on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

VOCABULARY = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0,
}  # fmt: skip
# name -> (transformers model class, what differs from COMMON). d_model 48 is not heads * d_kv 64, and
# the encoder is deeper than the decoder, in all of them; "deep_decoder" is the other way round.
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    "v1_1": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "gated_tied": (
        "T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True},
    ),
    "byt5": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 384, "num_layers": 4},
    ),
    "mt5": ("MT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5_tied": ("MT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True}),
    "umt5_tied": ("UMT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True}),
    # A decoder scale does not follow from tied weights: configurations of transformers 5 have either without the other.
    "untied_scaled": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "relu", "tie_word_embeddings": False, "scale_decoder": True},
    ),
    "tied_unscaled": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True, "scale_decoder": False},
    ),
    "silu": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    "deep_decoder": (
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "relu", "tie_word_embeddings": True, "num_layers": 1, "num_decoder_layers": 3,
         "d_kv": 5, "num_heads": 3},
    ),
}  # fmt: skip

_MADE: dict[str, Any] = {}


def make_student(name: str, seed: int = 0, spread: float = 1.0) -> Any:
    """Return a random transformers model; weights are drawn wide enough that logits and attention matter."""
    import torch
    import transformers

    if (name, seed, spread) in _MADE:
        return _MADE[name, seed, spread]
    kind, changes = STUDENTS[name]
    changes = dict(changes)
    scaled = changes.pop("scale_decoder", None)
    torch.manual_seed(seed)
    config_class = getattr(transformers, kind.replace("ForConditionalGeneration", "Config"))
    model = getattr(transformers, kind)(config_class(**{**COMMON, **changes})).eval()
    if not changes.get("tie_word_embeddings", True) and model.lm_head.weight is model.shared.weight:
        # transformers 5 makes every new T5 tied, and unties one only when it loads a checkpoint that is not
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "layer_norm" in key:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif "relative_attention_bias" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif "shared" in key or "embed_tokens" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            else:
                scale = 1.5 * spread / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    if scaled is not None:
        # transformers 4 reads the scale from the flag of tied weights, each time it runs
        new = hasattr(model.config, "scale_decoder_outputs")
        setattr(model.config, "scale_decoder_outputs" if new else "tie_word_embeddings", scaled)
    model.generation_config.max_length = None
    _MADE[name, seed, spread] = model
    return model


def make_ending(name: str, seed: int = 0, strength: float = 3.0) -> Any:
    """Return a student that ends its rows, each at another step: its end-of-sequence logit varies more than others."""
    import copy

    import torch

    model = copy.deepcopy(make_student(name, seed))
    with torch.no_grad():
        model.get_output_embeddings().weight[1].mul_(strength)
    return model


def random_rows(
    rows: int, length: int, seed: int = 1, *, ragged: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask; ragged rows are padded on the right, row 0 is full."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, (rows, length)).astype(np.int64)
    mask = np.ones_like(ids)
    if ragged:
        for row in range(1, rows):
            mask[row, rng.integers(2, length + 1) :] = 0
    return ids * mask, mask


def open_graph(model: onnx.ModelProto, **options: Any) -> Any:
    """Open a model that is in memory with one thread on the CPU."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = 1
    chosen.log_severity_level = 3
    for name, value in options.items():
        setattr(chosen, name, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), chosen, providers=["CPUExecutionProvider"])
