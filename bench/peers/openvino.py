"""OpenVINO with int8 weights (nncf) on plain exported graphs, and a Python loop."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.bench.peers.onnxruntime import OnnxRuntimeInt8
from sbs_edge.bench.peers.system import read_config

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PACKAGES", "ROOTS", "SYSTEM", "prepare"]

ROOTS: dict[str, tuple[str, ...]] = {"openvino": (), "tokenizers": ()}
PACKAGES = ("openvino", "nncf", "torch", "transformers")


def prepare(student: Path, out: Path) -> dict[str, Any]:
    """Export plain graphs with torch, convert each and compress its weights to int8."""
    import nncf
    import openvino

    from sbs_edge.bench.peers.plain_graphs import GRAPHS, export_plain

    with tempfile.TemporaryDirectory() as work:
        export_plain(student, Path(work))
        for name in GRAPHS:
            model = nncf.compress_weights(
                openvino.convert_model(Path(work) / f"{name}.onnx"), mode=nncf.CompressWeightsMode.INT8_SYM
            )
            openvino.save_model(model, out / f"{name}.xml", compress_to_fp16=False)
    return {"files": ["."]}


class OpenVino(OnnxRuntimeInt8):
    """Three compiled models on one stream; activations are quantized in groups by the plug-in."""

    precision = "int8 weights"

    def open(self) -> None:
        """Compile the graphs."""
        import openvino

        from sbs_edge.bench.peers.plain_graphs import GRAPHS, cache_names

        core = openvino.Core()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.spec.threads,
            "NUM_STREAMS": 1,
            # The plug-in's default of 32 was a third slower here; 512 was its best.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 512,
        }
        folder = Path(self.spec.artifact)
        self.layers = int(read_config(self.spec.student)["num_decoder_layers"])
        known = {"ids", "mask", "hidden", "token", *cache_names(self.layers)}
        self.requests = {}
        self.inputs = {}
        for name in GRAPHS:
            compiled = core.compile_model(str(folder / f"{name}.xml"), "CPU", settings)
            self.requests[name] = compiled.create_infer_request()
            # An input keeps the names of no-op nodes folded into it: pick the graph's own.
            self.inputs[name] = [next(n for n in i.names if n in known) for i in compiled.inputs]

    def run(self, name: str, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One graph; outputs are copied, since the request reuses its memory."""
        result = self.requests[name].infer({key: feed[key] for key in self.inputs[name]})
        return [value.copy() for value in result.values()]


SYSTEM = OpenVino
