"""One student exported for every target at once: what runs here is judged, what cannot is said to be unjudged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from sbs_edge.errors import UsageError
from sbs_edge.export.api import export
from sbs_edge.export.targets import TARGETS, providers_here
from sbs_edge.runtime.student import Student
from sbs_edge.runtime.tensorrt import TENSORRT as TENSORRT_PROVIDER
from sbs_edge.runtime.tensorrt import tensorrt_options

ROOT = Path(__file__).resolve().parents[3]
TENSORRT = os.environ.get("SBS_EDGE_TENSORRT_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def everything(
    trained: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A bundle with all targets, and its manifest."""
    out = tmp_path_factory.mktemp("all") / "bundle"
    result = export(trained[0], out, targets=list(TARGETS), beams=(3,), unguarded=True)
    return out, result.manifest


def test_every_target_is_in_the_bundle(everything: tuple[Path, dict[str, Any]]) -> None:
    path, manifest = everything
    assert list(manifest["targets"]) == list(TARGETS)
    for name, entry in manifest["targets"].items():
        target = TARGETS[name]
        roles = {"encoder", "decoder_step"} if target.steps else {"explainer"}
        assert roles | {"label_scorer"} <= set(entry)
        assert (entry["accuracy"] is not None) == bool(providers_here(target)) == ("unmeasured" not in entry)
        for role in (*roles, "label_scorer"):
            graph = onnx.load(path / entry[role], load_external_data=True)
            kinds = {tensor.data_type for tensor in graph.graph.initializer}
            half = {"fp16": onnx.TensorProto.FLOAT16, "int8-pairs": onnx.TensorProto.FLOAT16}.get(
                target.numbers
            )
            if target.numbers == "bf16":
                half = onnx.TensorProto.BFLOAT16
            assert half is None or half in kinds
            if target.standard:
                assert {entry.domain for entry in graph.opset_import} == {""}
            profile = path / f"{entry[role]}.profile.json"
            assert profile.exists() == target.profiles
            if target.profiles:
                options = tensorrt_options(path / entry[role], TENSORRT_PROVIDER, None)
                shapes = dict(item.split(":") for item in options["trt_profile_max_shapes"].split(","))
                free = {
                    value.name
                    for value in graph.graph.input
                    if any(dim.dim_param for dim in value.type.tensor_type.shape.dim)
                }
                assert set(shapes) == free
                assert {sizes.split("x")[0] for sizes in shapes.values()} == {str(entry["max_batch_rows"])}
                assert ("trt_int8_enable" in options) == (target.numbers == "int8-pairs")


def test_int4_answers_like_float(everything: tuple[Path, dict[str, Any]], trained: tuple[Path, Any]) -> None:
    path, manifest = everything
    texts = [json.loads(line)["input"] for line in (trained[0] / "validation.jsonl").read_text().splitlines()]
    with Student.load(path, "cpu-fp32") as exact, Student.load(path, "cpu-int4") as small:
        same = [a.label == b.label for a, b in zip(exact.predict(texts), small.predict(texts), strict=True)]
        words = [
            a.rationale == b.rationale
            for a, b in zip(exact.explain(texts[:20]), small.explain(texts[:20]), strict=True)
        ]
    assert sum(same) >= 0.98 * len(same)
    assert sum(words) >= 16
    assert manifest["targets"]["cpu-int4"]["quantisation"]["numbers"] == "int4"


def test_beams_write_rationales(everything: tuple[Path, dict[str, Any]]) -> None:
    with Student.load(everything[0], "cpu-int8") as student:
        greedy, beam = student.explain(["pump hot"]), student.explain(["pump hot"], num_beams=3)
        assert beam[0].rationale == greedy[0].rationale  # an easy task: the best beam is the greedy one
        with pytest.raises(UsageError, match="beam of width 5"):
            student.explain(["pump hot"], num_beams=5)


def test_a_target_whose_provider_is_absent_is_a_clear_error(everything: tuple[Path, dict[str, Any]]) -> None:
    if providers_here(TARGETS["cuda-fp16"]):
        pytest.skip("this machine has CUDA")
    with pytest.raises(UsageError, match="CUDAExecutionProvider") as caught:
        Student.load(everything[0], "cuda-fp16")
    assert caught.value.exit_code == 2


ON_HOST = {"providers": ["CPUExecutionProvider"], "threads": 1}


@pytest.mark.parametrize("target", ["cuda-fp16", "tensorrt-fp16", "tensorrt-int8"])
def test_gpu_targets_can_be_asked_on_the_host(
    everything: tuple[Path, dict[str, Any]], trained: tuple[Path, Any], target: str
) -> None:
    texts = [json.loads(line)["input"] for line in (trained[0] / "validation.jsonl").read_text().splitlines()]
    with (
        Student.load(everything[0], "cpu-fp32") as exact,
        Student.load(everything[0], target, **ON_HOST) as gpu,
    ):
        gpu.warm_up()
        same = [a.label == b.label for a, b in zip(exact.predict(texts), gpu.predict(texts), strict=True)]
        assert sum(same) >= 0.98 * len(same)
        ours, theirs = gpu.explain(texts[:20]), exact.explain(texts[:20])
        assert sum(a == b for a, b in zip(ours, theirs, strict=True)) >= 18
        # Company and limits, through the loop on the host.
        assert gpu.explain(texts[3:4]) == ours[3:4]
        assert [e.n_tokens for e in gpu.explain(texts[:5], 2)] == [2] * 5
        assert not any(e.complete for e in gpu.explain(texts[:5], 2))
        with pytest.raises(UsageError, match="beam of width 3"):
            gpu.explain(texts[:1], num_beams=3)


def test_open_labels_are_decoded_by_the_step_graph(make_student, tmp_path: Path, rows) -> None:
    student = make_student(tmp_path / "open", kind="open", labels=())
    export(
        student, tmp_path / "b", targets=("cpu-fp32", "cuda-fp16"), max_drop=100, unguarded=True,
        guard_data=[],
    )  # fmt: skip
    texts = [row["input"] for row in rows(12)]
    with Student.load(tmp_path / "b") as exact, Student.load(tmp_path / "b", "cuda-fp16", **ON_HOST) as gpu:
        same = 0
        for a, b in zip(exact.predict(texts), gpu.predict(texts), strict=True):
            same += a.label == b.label
            if a.label == b.label:
                assert b.probability == pytest.approx(a.probability, rel=0.1)
        assert same >= 10


@pytest.mark.tensorrt
def test_tensorrt_builds_what_was_exported(everything: tuple[Path, dict[str, Any]]) -> None:
    if subprocess.run([TENSORRT, "-c", "import tensorrt_rtx"], capture_output=True, check=False).returncode:
        pytest.skip("no tensorrt-rtx: set SBS_EDGE_TENSORRT_PYTHON to a Python with constraints/tensorrt.txt")
    graphs = sorted(everything[0].glob("tensorrt-*/*.onnx"))
    assert len(graphs) == 6
    ran = subprocess.run(
        [TENSORRT, str(ROOT / "export" / "check" / "tensorrt.py"), *map(str, graphs)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
