"""Calibrated 4-bit decoder weights: better than plain rounding, packed as the runtime reads them, really run."""

from __future__ import annotations

import numpy as np
import pytest
from graph_students import make_student, open_graph, random_rows
from operators import executed_operators

from sbs_edge.export.graphs.builder import CONTRIB, FLOAT, Graph
from sbs_edge.export.graphs.generate import build_rationale_generator
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.quant.gptq import pack_int4, quantise_int4, unpack_int4
from sbs_edge.export.quant.int4 import Int4
from sbs_edge.export.quant.precision import Int8
from sbs_edge.export.quant.ranges import collect_calibration


def correlated(n_in: int, rows: int, seed: int = 0) -> np.ndarray:
    """Inputs that vary together, as a network's do."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((n_in // 4, n_in))
    return (rng.standard_normal((rows, n_in // 4)) @ mixing + 0.3 * rng.standard_normal((rows, n_in))).astype(
        np.float32
    )


@pytest.mark.parametrize(("n_in", "n_out", "group"), [(96, 40, 32), (48, 64, 128), (256, 96, 128)])
def test_calibrated_rounding_beats_plain_rounding_on_unseen_rows(n_in: int, n_out: int, group: int) -> None:
    weight = np.random.default_rng(3).standard_normal((n_in, n_out)).astype(np.float32)
    inputs = correlated(n_in, 600)
    seen, unseen = inputs[:400], inputs[400:]

    def error(moments: np.ndarray | None) -> float:
        restored = unpack_int4(*quantise_int4(weight, moments, group), group)
        return float(np.square(unseen @ restored - unseen @ weight).mean())

    assert error(seen.T @ seen) < 0.5 * error(None)


@pytest.mark.parametrize(("n_in", "group"), [(96, 32), (48, 128), (256, 128)])
def test_the_runtime_reads_the_packing_as_meant(n_in: int, group: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((n_in, 24)).astype(np.float32)
    quantised, scales = quantise_int4(weight, None, group)
    packed, by_column = pack_int4(quantised, scales, group)
    graph = Graph()
    x = graph.input("x", FLOAT, ["rows", n_in])
    product = graph.op(
        "MatMulNBits", x, packed, by_column, domain=CONTRIB, K=n_in, N=24, bits=4, block_size=group
    )
    graph.output("y", FLOAT, ["rows", 24], product)
    rows = rng.standard_normal((5, n_in)).astype(np.float32)
    (got,) = open_graph(graph.model("packed")).run(None, {"x": rows})
    np.testing.assert_allclose(got, rows @ unpack_int4(quantised, scales, group), rtol=1e-4, atol=1e-4)


def test_decoder_steps_run_in_int4_and_the_encoder_in_int8() -> None:
    model = make_student("v1_1", spread=0.5)
    weights = weights_of(model)
    rng = np.random.default_rng(2)
    pairs = [(rng.integers(3, 320, 24).tolist(), rng.integers(3, 320, 12).tolist()) for _ in range(16)]
    stats = collect_calibration(model, pairs, moments=True)
    ids, mask = random_rows(6, 20)
    feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(1, np.int64)}
    graph = build_rationale_generator(weights, Int8(stats.norms), step_precision=Int4(stats, 32))
    executed = executed_operators(graph, feeds)
    # q k v o, q o, and three of the gated feed-forward in a layer, and the head
    assert executed["MatMulNBits"] == 9 * weights.n_decoder_layers + 1
    assert executed["MatMulIntegerToFloat"] == 7 * weights.n_encoder_layers + 2 * weights.n_decoder_layers
    session = open_graph(graph)
    together, _ = session.run(None, feeds)
    for row in range(len(ids)):
        alone, _ = session.run(
            None, {**feeds, "input_ids": ids[row : row + 1], "attention_mask": mask[row : row + 1]}
        )
        np.testing.assert_array_equal(alone, together[row : row + 1])


def test_uncalibrated_products_are_never_rounded_to_4_bits() -> None:
    model = make_student("t5")
    ids, mask = random_rows(2, 10)
    feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(1, np.int64)}
    stats = collect_calibration(model, [([5, 6, 1], [7, 1])])
    graph = build_rationale_generator(weights_of(model), Int8(stats.norms), step_precision=Int4(stats))
    assert executed_operators(graph, feeds)["MatMulNBits"] == 0
