"""int8 products: probed, exact with the option, in loops too, and never mixed up in the cache of weights."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sbs_edge.export.graphs.beams import build_beam_generator
from sbs_edge.export.graphs.builder import all_graphs
from sbs_edge.export.graphs.generate import build_rationale_generator
from sbs_edge.export.graphs.store import save_graphs
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.quant.int4 import Int4
from sbs_edge.export.quant.precision import Int8
from sbs_edge.export.quant.ranges import CalibrationStats
from sbs_edge.runtime import bundle as bundle_module
from sbs_edge.runtime import int8_products, sessions
from sbs_edge.runtime.bundle import seal
from sbs_edge.runtime.prepacked import cache_directory, prepacked_key
from sbs_edge.runtime.student import Student

TEXTS = ["hot pump", "cold room fan filter", "ice " * 20, "belt motor leak"]
X86 = int8_products.on_x86()


def saturating(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(M, K) uint8 times (K, N) int8 as ``vpmaddubsw`` and ``vpmaddwd`` do: pairs of products are cut to 16 bits."""
    pairs = a.astype(np.int32)[:, :, None] * b.astype(np.int32)[None]
    return np.clip(pairs[:, 0::2] + pairs[:, 1::2], -32768, 32767).sum(1)


def product(a: np.ndarray, b: np.ndarray, *, corrected: bool) -> np.ndarray:
    """Let the runtime multiply, with or without the option."""
    node = helper.make_node("MatMulIntegerToFloat", ["a", "b", "s", "t", "z"], ["y"], domain="com.microsoft")
    constants = {"b": b, "s": np.float32(1), "t": np.ones(b.shape[1], np.float32), "z": np.uint8(0)}
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("a", TensorProto.UINT8, a.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(a), b.shape[1]])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    if corrected:
        options.add_session_config_entry(*int8_products.EXACT_OPTION)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"a": a})[0].astype(np.int64)


@pytest.fixture
def extremes() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.choice(np.array([0, 1, 128, 200, 255], np.uint8), (5, 64))
    return a, rng.choice(np.array([-127, -90, 0, 90, 127], np.int8), (64, 24))


def test_the_emulation_saturates_where_the_probe_looks() -> None:
    a, b = np.full((1, 4), 255, np.uint8), np.full((4, 16), 127, np.int8)
    assert saturating(a, b).tolist() == [[65534] * 16]
    assert (a.astype(int) @ b.astype(int)).tolist() == [[4 * 255 * 127] * 16]


def test_the_probe_predicts_what_products_do_here(extremes: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = extremes
    exact, cut = a.astype(np.int64) @ b.astype(np.int64), saturating(a, b)
    assert (exact != cut).any()
    found = product(a, b, corrected=False)
    np.testing.assert_array_equal(found, cut if int8_products.products_saturate() else exact)


@pytest.mark.skipif(not X86, reason="the option exists on x86-64 alone")
def test_the_option_makes_products_exact_everywhere(extremes: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = extremes
    np.testing.assert_array_equal(product(a, b, corrected=True), a.astype(np.int64) @ b.astype(np.int64))


def test_the_probe_is_asked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    int8_products.products_saturate()

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the probe ran again")

    monkeypatch.setattr(onnxruntime, "InferenceSession", forbidden)
    assert int8_products.int8_products() in ("exact", "corrected")


def int4_of(weights: Any) -> Int4:
    """4-bit steps without a calibrated head: the head stays in int8."""
    stats = CalibrationStats()
    for name in ("decoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.2.DenseReluDense.wi"):
        stats.moments[name] = np.eye(weights.linear(name).shape[0], dtype=np.float32)
    return Int4(stats)


@pytest.mark.skipif(not X86, reason="the option exists on x86-64 alone")
@pytest.mark.parametrize(("steps", "beams"), list(itertools.product(["int8", "int4"], [1, 2])))
@pytest.mark.parametrize("tied", [True, False])
def test_the_option_reaches_every_product_of_a_loop(
    tiny: Any, tmp_path: Path, steps: str, beams: int, tied: bool
) -> None:
    class Untied(Int8):
        def tied_head(self, *_: Any, **__: Any) -> None:
            return None

    weights = weights_of(tiny.model)
    precision = Int8({}) if tied else Untied({})
    inner = int4_of(weights) if steps == "int4" else None
    if beams == 1:
        model = build_rationale_generator(weights, precision, None, inner)
    else:
        model = build_beam_generator(weights, precision, beams, None, inner)
    save_graphs({"explainer": model}, tmp_path)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*int8_products.EXACT_OPTION)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        str(tmp_path / "explainer.onnx"), options, providers=["CPUExecutionProvider"]
    )
    optimised = onnx.load(str(tmp_path / "optimised.onnx"))
    kinds: dict[str, int] = {}
    found = []
    for graph in all_graphs(optimised.graph):
        kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        found.append([kinds[node.input[1]] for node in graph.node if node.op_type == "MatMulIntegerToFloat"])
    assert all(found)
    assert len(found) == 2  # the graph and the loop's body
    assert {kind for part in found for kind in part} == {TensorProto.UINT8}


def test_constants_of_a_loop_are_stored_once_and_referred_to_from_its_body(tiny: Any, tmp_path: Path) -> None:
    """The body's weights lie in the same file as before, and no byte is stored twice."""
    weights = weights_of(tiny.model)
    save_graphs({"explainer": build_rationale_generator(weights, Int8({}))}, tmp_path)
    model = onnx.load(str(tmp_path / "explainer.onnx"), load_external_data=False)
    outer, body = all_graphs(model.graph)
    places = [
        tuple(entry.value for entry in tensor.external_data)
        for graph in (outer, body)
        for tensor in graph.initializer
        if tensor.external_data
    ]
    assert len(places) == len(set(places))
    assert any(tensor.external_data for tensor in body.initializer)
    used_outside = {name for node in outer.node for name in node.input}
    assert not used_outside & {tensor.name for tensor in body.initializer}


@pytest.fixture
def saturating_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sessions set the option, as on a CPU without VNNI; exact products stay exact with it."""
    monkeypatch.setattr(sessions, "needs_exact_option", lambda: True)
    int8_products.warn_of_old_loops.cache_clear()


def answers_of(bundle: Path, **options: Any) -> tuple[np.ndarray, list[str]]:
    with Student.load(bundle, "cpu-int8", threads=1, **options) as student:
        return student.label_scores(TEXTS), [answer.rationale for answer in student.explain(TEXTS, 8)]


@pytest.mark.skipif(not X86, reason="the option exists on x86-64 alone")
def test_answers_are_the_same_bits_with_the_option_and_through_the_cache(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if int8_products.products_saturate():
        pytest.skip("this CPU has no VNNI: there is nothing exact to compare with")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_module, "MIN_BYTES", 0)
    expected = answers_of(tiny_bundle)
    plain = {path.name for path in cache_directory().iterdir()}
    monkeypatch.setattr(sessions, "needs_exact_option", lambda: True)
    for _ in range(2):  # the first makes entries, the second uses them
        scores, rationales = answers_of(tiny_bundle)
        np.testing.assert_array_equal(scores, expected[0])
        assert rationales == expected[1]
        assert len({path.name for path in cache_directory().iterdir()} - plain) == 2
    scores, rationales = answers_of(tiny_bundle, prepacked_cache=False)
    np.testing.assert_array_equal(scores, expected[0])
    assert rationales == expected[1]


def test_the_cache_tells_corrected_entries_apart() -> None:
    assert prepacked_key(["a"]) != prepacked_key(["a"], corrected=True)


def as_exported_before(bundle: Path) -> Path:
    """Move the loop's constants out of its body and their mark out of the manifest, as earlier exports were."""
    for path in bundle.glob("*/explainer.onnx"):
        model = onnx.load(str(path), load_external_data=False)
        outer, body = all_graphs(model.graph)
        outer.initializer.extend(body.initializer)
        del body.initializer[:]
        path.write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["targets"].values():
        entry.pop("quantisation", None)
    seal(bundle, manifest)
    return bundle


def test_an_older_bundle_answers_as_before(tiny_bundle: Path, tmp_path: Path) -> None:
    old = as_exported_before(Path(shutil.copytree(tiny_bundle, tmp_path / "old")))
    expected, found = (answers_of(path, prepacked_cache=False) for path in (tiny_bundle, old))
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.usefixtures("saturating_cpu")
def test_an_older_bundle_says_once_that_rationales_may_differ(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = as_exported_before(Path(shutil.copytree(tiny_bundle, tmp_path / "old")))
    with caplog.at_level(logging.WARNING, "sbs_edge.runtime"):
        for _ in range(2):
            answers_of(old, prepacked_cache=False)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "rationales and open labels may differ" in said[0]
    assert str(old / "cpu-int8" / "explainer.onnx") in said[0]


@pytest.mark.usefixtures("saturating_cpu")
def test_a_new_bundle_says_nothing(
    tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new = Path(shutil.copytree(tiny_bundle, tmp_path / "new"))
    manifest = json.loads((new / "manifest.json").read_text())
    manifest["targets"]["cpu-int8"]["quantisation"] = {"numbers": "int8", "loop_weights": True}
    seal(new, manifest)
    with caplog.at_level(logging.WARNING, "sbs_edge.runtime"):
        answers_of(new, prepacked_cache=False)
    assert caplog.records == []
