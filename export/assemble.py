"""The graphs of one target, written into its folder of a bundle."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sbs_edge.export.explainer import build_explainer
from sbs_edge.export.graph import OPSET
from sbs_edge.export.label_scorer import build_label_scorer
from sbs_edge.export.labels import LabelPlan
from sbs_edge.export.mixed import Mixed
from sbs_edge.export.precision import Float32, Int8, Precision
from sbs_edge.export.store import save_graphs
from sbs_edge.export.targets import Target
from sbs_edge.export.trie_scorer import build_choice_scorer, build_trie_scorer
from sbs_edge.export.weights import T5Weights

__all__ = ["Recipe", "precision_of", "write_target"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything a target's graphs are made from.

    Attributes:
        weights: the checkpoint.
        plan: how labels are scored.
        ranges: largest magnitude after every norm, for static int8 scales.
        explains: write the graph that generates.
        output_tokens: sorted token ids the student may write; None: all.
        keep_float: layers that stay in float32 in lossy targets.
    """

    weights: T5Weights
    plan: LabelPlan
    ranges: Mapping[str, float]
    explains: bool
    output_tokens: np.ndarray | None = None
    keep_float: Collection[str] = field(default=())


def precision_of(target: Target, recipe: Recipe) -> Precision:
    """Return the number format of ``target``."""
    if target.numbers == "float32":
        return Float32()
    quantised = Int8(dict(recipe.ranges))
    return Mixed(quantised, recipe.weights, recipe.keep_float) if recipe.keep_float else quantised


def write_target(folder: Path, target: Target, recipe: Recipe) -> dict[str, Any]:
    """Write the graphs; return the target's entry in the manifest, paths relative to the bundle."""
    weights, plan = recipe.weights, recipe.plan
    models = {}
    if plan.method == "first-token":
        models["label_scorer"] = build_label_scorer(
            weights, precision_of(target, recipe), [ids[0] for ids in plan.token_ids]
        )
    elif plan.method == "trie":
        models["label_scorer"] = build_trie_scorer(weights, precision_of(target, recipe), plan.token_ids)
    elif plan.method == "choices":
        models["choice_scorer"] = build_choice_scorer(weights, precision_of(target, recipe))
    if recipe.explains:
        models["explainer"] = build_explainer(weights, precision_of(target, recipe), recipe.output_tokens)
    save_graphs(models, folder)
    return {
        **{name: f"{target.name}/{name}.onnx" for name in models},
        "providers": list(target.providers),
        "opset": OPSET,
        "quantisation": {
            "numbers": target.numbers,
            "lossy": target.lossy,
            "calibrated_norms": len(recipe.ranges) if target.numbers == "int8" else 0,
            "float32_layers": sorted(recipe.keep_float) if target.lossy else [],
            "output_tokens": None if recipe.output_tokens is None else len(recipe.output_tokens),
        },
        "accuracy": None,
    }
