"""A tied student's table lies in the graph once, and turning it for the head costs nothing when the graph runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_students import make_student, open_graph, random_rows

from sbs_edge.export.graphs.beams import build_beam_generator
from sbs_edge.export.graphs.builder import all_graphs, all_nodes
from sbs_edge.export.graphs.generate import build_rationale_generator
from sbs_edge.export.graphs.store import save_graphs
from sbs_edge.export.graphs.trie import build_choice_classifier
from sbs_edge.export.graphs.weights import T5Weights, weights_of
from sbs_edge.export.quant.mixed import Mixed
from sbs_edge.export.quant.precision import Float32, Int8
from sbs_edge.export.quant.qdq import Int8Pairs
from sbs_edge.export.quant.ranges import CalibrationStats


def constants_of(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Initialisers of the graph and of its loops' bodies."""
    return [tensor for graph in all_graphs(model.graph) for tensor in graph.initializer]


def tables(model: onnx.ModelProto, weights: T5Weights) -> int:
    """Return how many times a table of vocabulary times width is stored."""
    size = weights.vocab_size * weights.d_model
    return sum(int(np.prod(tensor.dims)) == size for tensor in constants_of(model))


def builders() -> dict[str, Any]:
    return {
        "explainer": build_rationale_generator,
        "choices": build_choice_classifier,
        "beam": lambda weights, precision: build_beam_generator(weights, precision, 2),
    }


@pytest.mark.parametrize("name", ["explainer", "choices", "beam"])
@pytest.mark.parametrize("precision", [Float32(), Int8({})], ids=["float32", "int8"])
def test_a_tied_table_is_stored_once_and_an_untied_one_is_not_mixed_up(name: str, precision: Any) -> None:
    tied, untied = (weights_of(make_student(family)) for family in ("t5", "v1_1"))
    assert tied.tied
    assert not untied.tied
    assert tables(builders()[name](tied, precision), tied) == 1
    assert tables(builders()[name](untied, precision), untied) == 2


def test_formats_that_cannot_share_keep_two() -> None:
    weights = weights_of(make_student("t5"))
    for precision, expected in (
        (Float32(contrib=False), 2),
        (Int8Pairs(CalibrationStats()), 2),
        (Mixed(Int8({}), weights, ["lm_head"]), 2),
        (Mixed(Int8({}), weights, ["shared"]), 2),
        (Mixed(Int8({}), weights, ["shared", "lm_head"]), 1),
    ):
        assert tables(build_choice_classifier(weights, precision), weights) == expected


@pytest.mark.parametrize("precision", [Float32(), Int8({})], ids=["float32", "int8"])
def test_the_head_is_the_product_it_was(precision: Any) -> None:
    """Shared or by itself, the same tokens and, in float32, the same log-probabilities."""
    weights = weights_of(make_student("t5"))
    ids, mask = random_rows(8, 20)
    feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(12, np.int64)}

    class Apart(type(precision)):  # type: ignore[misc]
        def tied_head(self, *_: Any, **__: Any) -> None:
            return None

    apart = Apart({}) if isinstance(precision, Int8) else Apart()
    tokens, chance = open_graph(build_rationale_generator(weights, precision)).run(None, feeds)
    expected_tokens, expected = open_graph(build_rationale_generator(weights, apart)).run(None, feeds)
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_allclose(chance, expected, rtol=1e-4)


@pytest.mark.parametrize("precision", [Float32(), Int8({})], ids=["float32", "int8"])
def test_no_step_turns_the_table(precision: Any, tmp_path: Path) -> None:
    """The optimised graph holds the transposed table as a constant, and no operator that transposes it."""
    import onnxruntime

    weights = weights_of(make_student("t5"))
    model = build_rationale_generator(weights, precision)
    assert (
        sum(
            node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]
            for node in all_nodes(model.graph)
        )
        == 2
    )
    save_graphs({"explainer": model}, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(tmp_path / "explainer.onnx"), options, providers=["CPUExecutionProvider"]
    )
    optimised = onnx.load(str(tmp_path / "optimised.onnx"))
    constants = {tensor.name for tensor in constants_of(optimised)}
    turned = [t for t in constants_of(optimised) if list(t.dims) == [weights.d_model, weights.vocab_size]]
    assert len(turned) == 1
    turning = [n for n in all_nodes(optimised.graph) if n.op_type == "Transpose" and n.input[0] in constants]
    assert turning == []
