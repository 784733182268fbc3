"""Every TensorRT graph through NVIDIA's parser and builder, in the environment that has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_students import make_student

from sbs_edge.export.graphs.label import build_label_classifier
from sbs_edge.export.graphs.step import build_decoder_step, build_encoder
from sbs_edge.export.graphs.trie import build_choice_classifier, build_trie_classifier
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.profiles import profile_of
from sbs_edge.export.quant.half import to_half
from sbs_edge.export.quant.precision import Float32
from sbs_edge.export.quant.qdq import Int8Pairs
from sbs_edge.export.quant.ranges import collect_calibration

ROOT = Path(__file__).resolve().parents[3]
LIMITS = {
    "batch": (1, 1, 8), "source": (1, 64, 256), "nodes": (1, 8, 32), "edges": (1, 8, 32), "labels": (1, 4, 16),
}  # fmt: skip


def interpreter() -> str:
    """A Python that has tensorrt-rtx: SBS_EDGE_TENSORRT_PYTHON, or this one."""
    return os.environ.get("SBS_EDGE_TENSORRT_PYTHON", sys.executable)


def has_tensorrt() -> bool:
    """Ask that Python."""
    return (
        subprocess.run(
            [interpreter(), "-c", "import tensorrt_rtx"], capture_output=True, check=False
        ).returncode
        == 0
    )


def graphs(model: Any, precision: Any) -> dict[str, onnx.ModelProto]:
    """All graphs of a TensorRT target."""
    weights = weights_of(model)
    return {
        "label_scorer": build_label_classifier(weights, precision, (17, 33, 201)),
        "trie_scorer": build_trie_classifier(weights, precision, ([17, 33, 1], [17, 1], [201, 1])),
        "choice_scorer": build_choice_classifier(weights, precision),
        "encoder": build_encoder(weights, precision),
        "decoder_step": build_decoder_step(weights, precision, 32, np.arange(0, 320, 2)),
    }


def checked(paths: list[Path]) -> tuple[int, list[dict[str, Any]]]:
    """Run the program and return its exit code and reports."""
    ran = subprocess.run(
        [interpreter(), str(ROOT / "export" / "check" / "tensorrt.py"), *map(str, paths)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return ran.returncode, [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def write(model: onnx.ModelProto, path: Path) -> Path:
    """Save a graph with its profile beside it."""
    onnx.save(model, path)
    path.with_name(path.name + ".profile.json").write_text(
        json.dumps(profile_of(model, LIMITS)), encoding="utf-8"
    )
    return path


@pytest.mark.tensorrt
@pytest.mark.parametrize("family", ["t5", "v1_1", "umt5"])
def test_tensorrt_builds_every_graph(family: str, tmp_path: Path) -> None:
    if not has_tensorrt():
        pytest.skip("no tensorrt-rtx: set SBS_EDGE_TENSORRT_PYTHON to a Python with constraints/tensorrt.txt")
    model = make_student(family)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(3, 300, 20).tolist(), rng.integers(3, 300, 8).tolist()) for _ in range(4)]
    written = []
    for numbers, precision in (
        ("fp16", Float32(contrib=False)), ("int8", Int8Pairs(collect_calibration(model, pairs))),
    ):  # fmt: skip
        for name, graph in graphs(model, precision).items():
            written.append(write(to_half(graph, "fp16"), tmp_path / f"{numbers}-{name}.onnx"))
    code, reports = checked(written)
    assert [(r["graph"], r["parsed"], r["built"]) for r in reports] == [
        (p.name, True, True) for p in written
    ], reports
    assert code == 0


@pytest.mark.tensorrt
def test_tensorrt_refuses_the_cpu_graph(tmp_path: Path) -> None:
    # Control: the check does say no. Per-row int8 in onnxruntime's own operators is a format of the CPU.
    if not has_tensorrt():
        pytest.skip("no tensorrt-rtx: set SBS_EDGE_TENSORRT_PYTHON to a Python with constraints/tensorrt.txt")
    from sbs_edge.export.quant.precision import Int8

    model = make_student("t5")
    graph = build_label_classifier(weights_of(model), Int8({}), (17, 33))
    code, (report,) = checked([write(graph, tmp_path / "cpu.onnx")])
    assert code == 1
    assert not report["built"]
    assert report["errors"]
