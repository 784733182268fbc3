"""Measure one way to read inputs of one length, in its own process, because a peak of memory never falls again.

A JSON object on stdin, the figures as a JSON object on stdout.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.footprint import memory_mb

__all__ = ["measure_peer", "measure_way"]


def _figures(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Call once, then ``calls`` timed times; return the median ms, the peak of memory, and its growth since before."""
    before = memory_mb()["peak_rss_mb"]
    call()
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - start))
    after = memory_mb()["peak_rss_mb"]
    return {"ms": statistics.median(taken), "peak_mb": after, "above_loaded_mb": after - before}


def measure_way(spec: dict[str, Any]) -> dict[str, Any]:
    """Answer logs with a bundle; ``accuracy`` is None for a bundle of another task."""
    from sbs_edge.bench.long.ways import Reader
    from sbs_edge.data.answers import same_answer
    from sbs_edge.data.shift_log import LATEST_NAME, NAME, ShiftLogSize, shift_log_rows

    task = json.loads((Path(spec["bundle"]) / "manifest.json").read_text(encoding="utf-8"))["task"]["name"]
    rows = shift_log_rows(
        "bench", spec["rows"], (spec["tokens"],), spec["seed"], latest=task == LATEST_NAME,
        n_phrases=ShiftLogSize().n_phrases,
    )  # fmt: skip
    with Reader(
        Path(spec["bundle"]), spec["way"], spec["target"], top_k=spec["top_k"], threads=spec["threads"]
    ) as reader:
        short = shift_log_rows("warm", 1, (40,), 0)[0].input
        reader.label(short)
        found: dict[str, Any] = dict(_figures(lambda: reader.label(rows[0].input), spec["calls"]))
        found["accuracy"] = None
        if task in (NAME, LATEST_NAME):
            found["accuracy"] = sum(same_answer(reader.label(r.input), r.label or "") for r in rows) / len(
                rows
            )
    return found


def measure_peer(spec: dict[str, Any]) -> dict[str, Any]:
    """Run LED or LongT5 of the bundle's width, depth and heads with random weights: encoder and one decoder step."""
    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    shape = json.loads((Path(spec["bundle"]) / "manifest.json").read_text(encoding="utf-8"))["model"]
    tokens = spec["tokens"]
    if spec["peer"] == "led":
        width = {"encoder_attention_heads": shape["n_heads"], "decoder_attention_heads": shape["n_heads"],
                 "encoder_ffn_dim": shape["d_ff"], "decoder_ffn_dim": shape["d_ff"]}  # fmt: skip
        config = transformers.LEDConfig(
            vocab_size=shape["vocab_size"], d_model=shape["d_model"], encoder_layers=shape["n_encoder_layers"],
            decoder_layers=shape["n_decoder_layers"], attention_window=512,
            max_encoder_position_embeddings=-(-tokens // 512) * 512, **width,
        )  # fmt: skip
        model: Any = transformers.LEDForConditionalGeneration(config).eval()
    else:
        config = transformers.LongT5Config(
            vocab_size=shape["vocab_size"], d_model=shape["d_model"], d_kv=shape["d_kv"], d_ff=shape["d_ff"],
            num_layers=shape["n_encoder_layers"], num_decoder_layers=shape["n_decoder_layers"],
            num_heads=shape["n_heads"], encoder_attention_type="local", decoder_start_token_id=0,
        )  # fmt: skip
        model = transformers.LongT5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, shape["vocab_size"], (1, tokens))

    def call(some: Any) -> None:
        with torch.no_grad():
            model(input_ids=some, decoder_input_ids=torch.zeros((1, 1), dtype=torch.long))

    call(ids[:, :40])
    return {**_figures(lambda: call(ids), spec["calls"]), "accuracy": None}


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    answer = measure_peer(asked) if "peer" in asked else measure_way(asked)
    sys.stdout.write(json.dumps(answer) + "\n")
