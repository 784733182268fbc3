"""Graphs for GPUs: the step graph in float32 against PyTorch, the rescale, half precision, int8 pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graph_students import make_student, open_graph, random_rows
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sbs_edge.export.graphs.label import build_label_classifier
from sbs_edge.export.graphs.step import build_decoder_step, build_encoder
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.quant.half import to_half
from sbs_edge.export.quant.precision import Float32
from sbs_edge.export.quant.qdq import Int8Pairs
from sbs_edge.export.quant.ranges import collect_calibration
from sbs_edge.export.quant.rescale import Rescale, fp16_rescale, rescale

LABELS = (17, 33, 201)
STANDARD = Float32(contrib=False)


def pairs() -> list[tuple[list[int], list[int]]]:
    """Rows to measure ranges on."""
    rng = np.random.default_rng(5)
    return [(rng.integers(3, 320, 24).tolist(), rng.integers(3, 320, 8).tolist()) for _ in range(12)]


def test_gpu_graphs_use_standard_operators_only(student: Any) -> None:
    weights = weights_of(student)
    stats = collect_calibration(student, pairs())
    for precision in (STANDARD, Int8Pairs(stats)):
        for model in (
            build_label_classifier(weights, precision, LABELS), build_encoder(weights, precision),
            build_decoder_step(weights, precision, 8),
        ):  # fmt: skip
            half = to_half(model, "fp16")
            onnx.checker.check_model(half, full_check=True)
            assert {entry.domain for entry in half.opset_import} == {""}


@pytest.mark.parametrize("by", [Rescale(64.0, 1.0), Rescale(64.0, 8.0), Rescale(1024.0, 1024.0)])
def test_rescaling_changes_no_bit(student: Any, by: Rescale) -> None:
    weights = weights_of(student)
    if by.hidden != 1 and not (weights.gated or weights.activation == "relu"):
        by = Rescale(by.residual, 1.0)  # this hidden layer has no linear half to divide
    ids, mask = random_rows(4, 20)
    feeds = {"input_ids": ids, "attention_mask": mask}
    (plain,) = open_graph(build_label_classifier(weights, STANDARD, LABELS)).run(None, feeds)
    (scaled,) = open_graph(build_label_classifier(rescale(weights, by), STANDARD, LABELS)).run(None, feeds)
    np.testing.assert_array_equal(scaled, plain)


class RMSNormalization(OpRun):  # type: ignore[misc]
    """With the float32 inside that stash_type 1 asks for and onnx 1.23's reference leaves out."""

    op_domain = ""

    def _run(self, x: np.ndarray, scale: np.ndarray, axis: int, epsilon: float, stash_type: int) -> Any:
        assert (axis, stash_type) == (-1, 1)
        wide = x.astype(np.float32)
        normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
        return (normed.astype(x.dtype) * scale,)


def overflowing(family: str) -> Any:
    """A checkpoint whose feed-forward writes values beyond fp16's 65504, as trained T5 models do."""
    model = make_student(family, seed=9, spread=0.5)
    if not getattr(model, "made_to_overflow", False):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".wo.weight"):
                    parameter.mul_(60000.0)
                elif "shared" in name or "embed_tokens" in name:
                    parameter.mul_(30.0)
    model.made_to_overflow = True
    return model


@pytest.mark.parametrize("family", ["t5", "v1_1", "umt5"])
def test_plain_fp16_overflows_and_the_rescale_cures_it(family: str) -> None:
    # onnx's reference runs every operator in fp16 with numpy. The CPU provider would compute in float32 and hide it.
    model = overflowing(family)
    weights = weights_of(model)
    stats = collect_calibration(model, pairs())
    by = fp16_rescale(stats, weights)
    assert stats.largest_residual > 65504
    assert by.residual > 1
    ids, mask = random_rows(3, 16)
    feeds = {"input_ids": ids, "attention_mask": mask}
    (exact,) = open_graph(build_label_classifier(weights, STANDARD, LABELS)).run(None, feeds)

    def in_fp16(checkpoint: Any) -> tuple[np.ndarray, list[str]]:
        """The scores, and the operators whose fp16 output holds an infinity."""
        graph = to_half(build_label_classifier(checkpoint, STANDARD, LABELS), "fp16")
        with np.errstate(all="ignore"):
            values = ReferenceEvaluator(graph, new_ops=[RMSNormalization]).run(None, feeds, intermediate=True)
        infinite = [
            node.op_type for node in graph.graph.node for name in node.output
            if np.isinf(np.asarray(values[name], np.float32)).any()
        ]  # fmt: skip
        return np.asarray(values["scores"]), infinite

    spoiled, infinite = in_fp16(weights)
    assert infinite[0] in ("MatMul", "Add")  # the feed-forward's output, or the stream it is added to
    assert not np.isfinite(spoiled).all()
    cured, infinite = in_fp16(rescale(weights, by))
    assert infinite == []
    assert np.isfinite(cured).all()
    assert np.abs(cured - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("family", ["t5", "v1_1"])
def test_int8_pairs_stay_near_float(family: str) -> None:
    model = make_student(family, spread=0.5)
    weights, stats = weights_of(model), collect_calibration(model, pairs())
    ids, mask = random_rows(32, 24)
    feeds = {"input_ids": ids, "attention_mask": mask}
    (exact,) = open_graph(build_label_classifier(weights, STANDARD, LABELS)).run(None, feeds)
    (got,) = open_graph(build_label_classifier(weights, Int8Pairs(stats), LABELS)).run(None, feeds)
    assert np.sqrt(((got - exact) ** 2).mean()) < 0.2 * exact.std()
    (half,) = open_graph(to_half(build_label_classifier(weights, Int8Pairs(stats), LABELS), "fp16")).run(
        None, feeds
    )
    assert np.sqrt(((half - exact) ** 2).mean()) < 0.2 * exact.std()
