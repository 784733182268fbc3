"""The graphs of one target, written into its folder of a bundle."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sbs_edge.export.graphs.beams import build_beam_generator
from sbs_edge.export.graphs.builder import OPSET
from sbs_edge.export.graphs.generate import build_rationale_generator
from sbs_edge.export.graphs.label import build_label_classifier
from sbs_edge.export.graphs.states import (
    build_state_choice_classifier,
    build_state_encoder,
    build_state_label_classifier,
    build_state_rationale_generator,
    build_state_trie_classifier,
)
from sbs_edge.export.graphs.step import build_decoder_step, build_encoder
from sbs_edge.export.graphs.store import save_graphs
from sbs_edge.export.graphs.trie import build_choice_classifier, build_trie_classifier
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.labels import LabelPlan
from sbs_edge.export.profiles import profile_of
from sbs_edge.export.quant.half import HalfType, to_half
from sbs_edge.export.quant.int4 import Int4
from sbs_edge.export.quant.mixed import Mixed
from sbs_edge.export.quant.precision import Float32, Int8, Precision
from sbs_edge.export.quant.qdq import Int8Pairs
from sbs_edge.export.quant.ranges import CalibrationStats
from sbs_edge.export.quant.rescale import Rescale, fp16_rescale, rescale
from sbs_edge.export.targets import Target
from sbs_edge.runtime.batches import padded_length
from sbs_edge.runtime.int8_products import int8_products

__all__ = ["PROFILE_ROWS", "GraphInputs", "half_of", "precision_of", "write_target"]

PROFILE_ROWS = 16  # most rows a call that TensorRT's engines are built for; the runtime keeps to it


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """Everything a target's graphs are made from.

    Attributes:
        weights: the checkpoint.
        plan: how labels are scored.
        ranges: largest magnitude after every norm, for static int8 scales.
        explains: write the graph that generates.
        output_tokens: sorted token ids the student may write; None: all.
        keep_float: layers that stay in float32 in lossy targets.
        stats: everything calibration measured, for int4, fp16 and TensorRT's int8.
        max_source_tokens: longest input, for TensorRT's profiles.
        max_new_tokens: places in the cache of a step graph: the longest rationale or open label.
        beams: widths of beam search to write a graph for, besides the greedy one.
        long: write the graphs that read long inputs in chunks; on CPU targets.
    """

    weights: T5Weights
    plan: LabelPlan
    ranges: Mapping[str, float]
    explains: bool
    output_tokens: np.ndarray | None = None
    keep_float: Collection[str] = field(default=())
    stats: CalibrationStats = field(default_factory=CalibrationStats)
    max_source_tokens: int = 512
    max_new_tokens: int = 128
    beams: tuple[int, ...] = ()
    long: bool = False


def precision_of(target: Target, recipe: GraphInputs) -> Precision:
    """Return the number format of ``target``; half-precision graphs are written in float32 and converted."""
    if target.numbers in ("float32", "fp16", "bf16"):
        return Float32(contrib=not target.standard)
    quantised: Precision = (
        Int8Pairs(recipe.stats) if target.numbers == "int8-pairs" else Int8(dict(recipe.ranges))
    )
    return _mixed(quantised, recipe)


def _mixed(quantised: Precision, recipe: GraphInputs) -> Precision:
    return Mixed(quantised, recipe.weights, recipe.keep_float) if recipe.keep_float else quantised


def half_of(target: Target) -> HalfType | None:
    """Return the half type of a target's graphs, if they have one."""
    if target.numbers in ("fp16", "int8-pairs"):
        return "fp16"
    return "bf16" if target.numbers == "bf16" else None


def write_target(folder: Path, target: Target, recipe: GraphInputs) -> dict[str, Any]:
    """Write the graphs; return the target's entry in the manifest, paths relative to the bundle."""
    half = half_of(target)
    by = fp16_rescale(recipe.stats, recipe.weights) if half == "fp16" else Rescale()
    profiles: dict[str, Any] = {}

    def finished() -> Iterator[tuple[str, onnx.ModelProto]]:
        for name, model in _models(target, replace(recipe, weights=rescale(recipe.weights, by))):
            if target.profiles:
                profiles[name] = profile_of(model, _limits(recipe))
            yield name, model if half is None else to_half(model, half)

    names = save_graphs(finished(), folder)
    for name, profile in profiles.items():
        path = folder / f"{name}.onnx.profile.json"
        path.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
    return {
        **{name: f"{target.name}/{name}.onnx" for name in names},
        "providers": list(target.providers),
        **({"max_batch_rows": PROFILE_ROWS} if target.profiles else {}),
        "opset": OPSET,
        "quantisation": {
            "numbers": target.numbers,
            "lossy": target.lossy,
            "calibrated_norms": len(recipe.ranges) if target.numbers.startswith("int") else 0,
            "float32_layers": sorted(recipe.keep_float) if target.lossy else [],
            "output_tokens": None if recipe.output_tokens is None else len(recipe.output_tokens),
            "residual_divided_by": by.residual,
            "hidden_divided_by": by.hidden,
            **(_int8_facts(names) if target.numbers in ("int8", "int4") else {}),
        },
        "accuracy": None,
    }


def _int8_facts(names: Collection[str]) -> dict[str, Any]:
    """Return the facts that decide whether another CPU gives the same answers: see docs/bundle.md."""
    return {
        "int8_products": int8_products(),
        "loop_weights": any(name.startswith("explainer") for name in names),
    }


def _models(target: Target, recipe: GraphInputs) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield the target's graphs by role, one at a time: each holds its own copy of the weights."""
    weights, plan, kept = recipe.weights, recipe.plan, recipe.output_tokens
    precision = precision_of(target, recipe)
    if plan.method == "first-token":
        yield "label_scorer", build_label_classifier(weights, precision, [ids[0] for ids in plan.token_ids])
    elif plan.method == "trie":
        yield "label_scorer", build_trie_classifier(weights, precision, plan.token_ids)
    elif plan.method == "choices":
        yield "choice_scorer", build_choice_classifier(weights, precision)
    if recipe.explains and target.steps:
        yield "encoder", build_encoder(weights, precision)
        yield "decoder_step", build_decoder_step(weights, precision, recipe.max_new_tokens, kept)
    elif recipe.explains:
        steps = _mixed(Int4(recipe.stats), recipe) if target.numbers == "int4" else None
        yield "explainer", build_rationale_generator(weights, precision, kept, steps)
        for width in recipe.beams:
            graph = build_beam_generator(weights, precision, width, kept, steps)
            yield f"explainer_beam{width}", graph
    if recipe.long:
        yield from _long_models(target, recipe, precision)


def _long_models(
    target: Target, recipe: GraphInputs, precision: Precision
) -> Iterator[tuple[str, onnx.ModelProto]]:
    """Yield the graphs for long inputs; last, so that the others' files are what they are without."""
    weights, plan = recipe.weights, recipe.plan
    yield "long_encoder", build_state_encoder(weights, precision)
    if plan.method == "first-token":
        firsts = [ids[0] for ids in plan.token_ids]
        yield "long_label_scorer", build_state_label_classifier(weights, precision, firsts)
    elif plan.method == "trie":
        yield "long_label_scorer", build_state_trie_classifier(weights, precision, plan.token_ids)
    elif plan.method == "choices":
        yield "long_choice_scorer", build_state_choice_classifier(weights, precision)
    if recipe.explains:
        steps = _mixed(Int4(recipe.stats), recipe) if target.numbers == "int4" else None
        graph = build_state_rationale_generator(weights, precision, recipe.output_tokens, steps)
        yield "long_explainer", graph


def _limits(recipe: GraphInputs) -> dict[str, tuple[int, int, int]]:
    """Return (least, usual, most) of every free dimension, for TensorRT's profiles."""
    most = padded_length(recipe.max_source_tokens)
    tokens = max(2, *(len(ids) for ids in recipe.plan.token_ids or ((0, 0),)))
    return {
        "batch": (1, 1, PROFILE_ROWS), "source": (1, min(64, most), most), "nodes": (1, 8, 32 * tokens),
        "edges": (1, 8, 32 * tokens), "labels": (1, 4, 32),
    }  # fmt: skip
