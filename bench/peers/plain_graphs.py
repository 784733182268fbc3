"""A student's plain ONNX graphs, as torch's exporter writes them: what a careful user does by hand.

Three graphs: ``encoder``, ``first`` (the first decoder step, which also computes the cross-attention
cache) and ``step`` (one more token with both caches). The peers ``onnxruntime-int8`` and ``openvino``
start from them; nothing here is this project's own graph writer.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["GRAPHS", "cache_names", "export_plain", "greedy"]

GRAPHS = ("encoder", "first", "step")
Feed = dict[str, "np.ndarray"]


def cache_names(layers: int) -> list[str]:
    """Names of the cache tensors: self key and value, cross key and value, layer by layer."""
    return [f"{kind}_{layer}" for layer in range(layers) for kind in ("sk", "sv", "ck", "cv")]


def _modules(model: Any) -> tuple[Any, Any, Any]:
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    def tensors(cache: Any, cross: bool) -> list[Any]:
        found = []
        for own, other in zip(
            cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True
        ):
            found += [own.keys, own.values] + ([other.keys, other.values] if cross else [])
        return found

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.get_encoder()

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.inner(input_ids=ids, attention_mask=mask).last_hidden_state

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, token: Any, hidden: Any, mask: Any) -> Any:
            out = self.inner(
                encoder_outputs=(hidden,), attention_mask=mask, decoder_input_ids=token, use_cache=True
            )
            return (out.logits, *tensors(out.past_key_values, cross=True))

    class Step(First):
        def forward(self, token: Any, hidden: Any, mask: Any, *past: Any) -> Any:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for layer in range(len(past) // 4):
                own_key, own_value, key, value = past[4 * layer : 4 * layer + 4]
                cache.self_attention_cache.update(own_key, own_value, layer)
                cache.cross_attention_cache.update(key, value, layer)
                cache.is_updated[layer] = True
            out = self.inner(
                encoder_outputs=(hidden,),
                attention_mask=mask,
                decoder_input_ids=token,
                past_key_values=cache,
                use_cache=True,
            )
            return (out.logits, *tensors(out.past_key_values, cross=False))

    # torch's exporter hands a module back in the mode it found: eval, or dropout would come alive.
    return Encoder().eval(), First().eval(), Step().eval()


def export_plain(student: Path, out: Path) -> int:
    """Write ``encoder.onnx``, ``first.onnx`` and ``step.onnx`` in fp32; return the decoder's depth."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(
        student, attn_implementation="eager", local_files_only=True
    ).eval()
    layers = int(model.config.num_decoder_layers)
    encoder, first, step = _modules(model)
    ids = torch.randint(3, 60, (2, 7))
    mask = torch.ones_like(ids)
    token = torch.zeros(2, 1, dtype=torch.long)
    caches = cache_names(layers)
    grown = [f"out_{name}" for name in caches if name[0] == "s"]
    rows: dict[str, dict[int, str]] = {
        "ids": {0: "b", 1: "s"},
        "mask": {0: "b", 1: "s"},
        "hidden": {0: "b", 1: "s"},
        "token": {0: "b"},
        **{name: {0: "b", 2: "t" if name[0] == "s" else "s"} for name in caches},
        **{name: {0: "b", 2: "t1"} for name in grown},
    }

    def write(module: Any, feed: tuple[Any, ...], name: str, inputs: list[str], outputs: list[str]) -> None:
        axes = {key: rows[key] for key in (*inputs, *outputs) if key in rows}
        torch.onnx.export(
            module,
            feed,
            str(out / f"{name}.onnx"),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warnings: the graphs are compared with PyTorch in the tests
        hidden = encoder(ids, mask)
        past = list(first(token, hidden, mask)[1:])
        grown_cache = step(token, hidden, mask, *past)[1:]
        for layer in range(layers):
            past[4 * layer : 4 * layer + 2] = grown_cache[2 * layer : 2 * layer + 2]
        write(encoder, (ids, mask), "encoder", ["ids", "mask"], ["hidden"])
        write(first, (token, hidden, mask), "first", ["token", "hidden", "mask"], ["logits", *caches])
        write(
            step,
            (token, hidden, mask, *past),
            "step",
            ["token", "hidden", "mask", *caches],
            ["logits", *grown],
        )
    return layers


def greedy(
    run: Callable[[str, Feed], list[np.ndarray]],
    ids: np.ndarray,
    mask: np.ndarray,
    *,
    layers: int,
    steps: int,
    start: int,
    eos: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy decoding over the three graphs.

    Args:
        run: takes a graph's name and its feed (inputs it pruned are the caller's to drop).
        ids: (B, S) int64.
        mask: (B, S) int64.
        layers: of the decoder.
        steps: new tokens at most.
        start: id of the decoder's start token.
        eos: id of the end-of-sequence token.

    Returns:
        Tokens (B, n) int64 and the first step's logits (B, V).
    """
    names = cache_names(layers)
    (hidden,) = run("encoder", {"ids": ids, "mask": mask})
    token = np.full((len(ids), 1), start, dtype=np.int64)
    out = run("first", {"token": token, "hidden": hidden, "mask": mask})
    logits, cache = out[0], dict(zip(names, out[1:], strict=True))
    token = logits[:, -1:].argmax(axis=-1).astype(np.int64)
    found, ended = [token], token[:, 0] == eos
    while len(found) < steps and not ended.all():
        out = run("step", {"token": token, "hidden": hidden, "mask": mask, **cache})
        cache.update(zip((n for n in names if n[0] == "s"), out[1:], strict=True))
        token = out[0][:, -1:].argmax(axis=-1).astype(np.int64)
        ended |= token[:, 0] == eos
        found.append(token)
    return np.concatenate(found, axis=1), logits[:, -1]
