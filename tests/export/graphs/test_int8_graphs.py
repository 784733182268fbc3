"""Batch-invariant int8: what runs, that company changes no bit, and that padding changes next to nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graph_students import make_student, open_graph, random_rows
from operators import INT8_PRODUCTS, executed_operators

from sbs_edge.export.graphs.generate import build_rationale_generator
from sbs_edge.export.graphs.label import build_label_classifier
from sbs_edge.export.graphs.trie import build_choice_classifier, build_trie_classifier
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.quant.precision import Float32, Int8
from sbs_edge.export.quant.ranges import CalibrationStats, collect_calibration
from sbs_edge.runtime.trie import batch_tries, build_trie

LABELS = (17, 33, 201)
TRIE = ([17, 33, 1], [17, 1], [201, 9, 1])


def calibration(model: Any, rows: int = 16, *, moments: bool = False) -> CalibrationStats:
    """Random rows like those the tests score."""
    rng = np.random.default_rng(7)
    pairs = [(rng.integers(3, 320, 30).tolist(), rng.integers(3, 320, 9).tolist()) for _ in range(rows)]
    return collect_calibration(model, pairs, moments=moments)


def builders(model: Any) -> dict[str, Any]:
    """The scoring graphs in int8."""
    weights, precision = weights_of(model), Int8(calibration(model).norms)
    return {
        "first-token": build_label_classifier(weights, precision, LABELS),
        "trie": build_trie_classifier(weights, precision, TRIE),
        "choices": build_choice_classifier(weights, precision),
        "explainer": build_rationale_generator(weights, precision),
    }


@pytest.mark.parametrize("family", ["t5", "v1_1", "byt5", "mt5", "umt5"])
@pytest.mark.parametrize("method", ["first-token", "trie", "choices", "explainer"])
def test_scores_are_bit_identical_whatever_shares_the_batch(family: str, method: str) -> None:
    graph = open_graph(builders(make_student(family))[method])
    ids, mask = random_rows(24, 37)
    rows: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask}
    shared: dict[str, np.ndarray] = {}
    if method == "choices":
        rows |= batch_tries([build_trie(TRIE[: 2 + row % 2], 0) for row in range(len(ids))])
    elif method == "explainer":
        shared["max_new_tokens"] = np.array(12, np.int64)
    together = graph.run(None, {**rows, **shared})
    for size in (1, 2, 5, 8):
        for low in range(0, len(ids) - size + 1, size):
            part = {name: value[low : low + size] for name, value in rows.items()}
            for alone, all_rows in zip(graph.run(None, {**part, **shared}), together, strict=True):
                expected = all_rows[low : low + size]
                if expected.ndim == 2:  # a call ends with its longest text; in longer company padding follows
                    assert not expected[:, alone.shape[1] :].any()
                    expected = expected[:, : alone.shape[1]]
                np.testing.assert_array_equal(alone, expected)


def test_per_tensor_scales_would_fail_the_test_above() -> None:
    # Control: quantising a whole tensor with one scale does depend on company, and the comparison sees it.
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    weight = helper.make_tensor(
        "w", TensorProto.INT8, (32, 8), rng.integers(-100, 100, 256).astype(np.int8).tobytes(), raw=True
    )
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["b", 32])], [value("y", 1, ["b", 8])], [weight])
    session = open_graph(
        onnx.helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    x = rng.standard_normal((4, 32)).astype(np.float32)
    assert (session.run(None, {"x": x})[0][:1] != session.run(None, {"x": x[:1]})[0]).any()


@pytest.mark.parametrize("family", ["t5", "v1_1"])
def test_padding_moves_int8_scores_no_more_than_rounding_carried_through(family: str) -> None:
    model = make_student(family)
    weights = weights_of(model)
    quantised = open_graph(builders(model)["first-token"])
    exact = open_graph(build_label_classifier(weights, Float32(), LABELS))
    moved = {"int8": 0.0, "float32": 0.0}
    flips = 0
    ids, mask = random_rows(1000, 24, ragged=False)
    longer = np.concatenate([ids, np.zeros_like(ids)], 1), np.concatenate([mask, np.zeros_like(mask)], 1)
    for name, graph in (("int8", quantised), ("float32", exact)):
        (plain,) = graph.run(None, {"input_ids": ids, "attention_mask": mask})
        (padded,) = graph.run(None, {"input_ids": longer[0], "attention_mask": longer[1]})
        moved[name] = float(np.abs(plain - padded).max() / np.abs(plain).max())
        if name == "int8":
            flips = int((plain.argmax(1) != padded.argmax(1)).sum())
    # A last-place difference in float32 attention can cross a rounding border of int8: one step of one value.
    assert moved["float32"] < 1e-5
    assert moved["int8"] < 0.02
    assert flips == 0


@pytest.mark.parametrize("family", ["t5", "v1_1", "umt5"])
def test_every_weight_product_runs_in_int8(family: str) -> None:
    model = make_student(family)
    weights = weights_of(model)
    ids, mask = random_rows(2, 12)
    executed = executed_operators(builders(model)["first-token"], {"input_ids": ids, "attention_mask": mask})
    a_layer = 7 if weights.gated else 6
    encoder = weights.n_encoder_layers * a_layer
    decoder = weights.n_decoder_layers * (a_layer - 1 + 1) - 3  # layer 0: no O.V, no query, no key product
    assert sum(executed[name] for name in INT8_PRODUCTS) >= encoder + decoder
    # what stays float: scores and pooling of the one query, two a decoder layer
    assert executed["MatMul[float]"] + executed["FusedMatMul[float]"] == 2 * weights.n_decoder_layers
    tokens = executed_operators(
        build_rationale_generator(weights, Int8(calibration(model).norms)),
        {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(1, np.int64)},
    )
    assert tokens["MatMul[float]"] == tokens["FusedMatMul[float]"] == 0
    assert sum(tokens[name] for name in INT8_PRODUCTS) > encoder


def test_weight_only_int8_is_caught() -> None:
    # The provider folds DequantizeLinear of a constant into float32; the check must not be fooled.
    from sbs_edge.export.graphs.builder import FLOAT, Graph
    from sbs_edge.export.quant.precision import quantise_columns

    graph = Graph()
    x = graph.input("x", FLOAT, ["b", 32])
    quantised, scales = quantise_columns(np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32))
    product = graph.op("MatMul", x, graph.op("DequantizeLinear", quantised, scales, axis=1))
    graph.output("y", FLOAT, ["b", 8], product)
    executed = executed_operators(graph.model("weight_only"), {"x": np.ones((2, 32), np.float32)})
    assert sum(executed[name] for name in INT8_PRODUCTS) == 0


@pytest.mark.parametrize("family", ["t5", "v1_1", "mt5", "umt5"])
def test_int8_stays_near_float(family: str) -> None:
    model = make_student(family, spread=0.5)
    ids, mask = random_rows(64, 30)
    feeds = {"input_ids": ids, "attention_mask": mask}
    (exact,) = open_graph(build_label_classifier(weights_of(model), Float32(), LABELS)).run(None, feeds)
    (got,) = open_graph(builders(model)["first-token"]).run(None, feeds)
    assert np.sqrt(((got - exact) ** 2).mean()) < 0.15 * exact.std()
