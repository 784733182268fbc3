"""Options of TensorRT's provider, read back as onnxruntime reads them, with shapes by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbs_edge.errors import IntegrityError
from sbs_edge.runtime.batches import token_budget_batches
from sbs_edge.runtime.tensorrt import RTX, TENSORRT, tensorrt_options

PROFILE = {
    "input_ids": {"min": [1, 1], "opt": [1, 64], "max": [16, 512]},
    "past_0": {"min": [1, 8, 32, 64], "opt": [1, 8, 32, 64], "max": [16, 8, 32, 64]},
    "step": {"min": [], "opt": [], "max": []},
    "table": {"min": [4, 4], "opt": [4, 4], "max": [4, 4]},
}


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"..MatMul..")
    (tmp_path / "encoder.onnx.profile.json").write_text(json.dumps(PROFILE))
    return path


@pytest.mark.parametrize(("provider", "prefix"), [(TENSORRT, "trt"), (RTX, "nv")])
def test_every_free_input_has_its_three_shapes(graph: Path, provider: str, prefix: str) -> None:
    options = tensorrt_options(graph, provider, None)
    for which in ("min", "opt", "max"):
        pairs = (item.split(":") for item in options[f"{prefix}_profile_{which}_shapes"].split(","))
        read = {name: [int(size) for size in sizes.split("x")] for name, sizes in pairs}
        assert read == {name: PROFILE[name][which] for name in ("input_ids", "past_0")}
    assert not any("cache" in name for name in options)


def test_int8_is_allowed_where_the_graph_has_pairs(graph: Path) -> None:
    assert "trt_int8_enable" not in tensorrt_options(graph, TENSORRT, None)
    graph.write_bytes(b"..QuantizeLinear..")
    assert tensorrt_options(graph, TENSORRT, None)["trt_int8_enable"] == "1"
    assert "trt_int8_enable" not in tensorrt_options(graph, RTX, None)


def test_engines_of_different_graphs_lie_apart_and_are_the_users_own(graph: Path) -> None:
    one, other = (tensorrt_options(graph, TENSORRT, [name])["trt_engine_cache_path"] for name in "ab")
    assert one != other
    assert Path(one).is_dir()
    assert Path(one).stat().st_mode & 0o077 == 0
    assert tensorrt_options(graph, RTX, ["a"])["nv_runtime_cache_path"] == one
    Path(one).chmod(0o777)  # an engine is code: one that others could have written is not loaded
    assert "trt_engine_cache_path" not in tensorrt_options(graph, TENSORRT, ["a"])


def test_a_graph_without_a_profile_is_built_for_the_shapes_it_meets(graph: Path) -> None:
    graph.with_name("encoder.onnx.profile.json").unlink()
    assert tensorrt_options(graph, TENSORRT, None) == {"trt_fp16_enable": "1"}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}x", '{"a": {"min": [1], "max": [2]}}', '{"a": {"min": 1, "opt": 2, "max": 3}}']
)
def test_a_profile_that_is_none_is_refused(graph: Path, content: str) -> None:
    graph.with_name("encoder.onnx.profile.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"encoder\.onnx\.profile\.json"):
        tensorrt_options(graph, TENSORRT, None)


def test_a_call_carries_no_more_rows_than_the_engines_were_built_for() -> None:
    lengths = [5] * 70 + [40] * 3
    assert [len(rows) for rows in token_budget_batches(lengths, 512)] == [64, 6, 3]
    assert [len(rows) for rows in token_budget_batches(lengths, 512, 16)] == [16, 16, 16, 16, 6, 3]
    assert list(token_budget_batches([], 512)) == []
