"""onnxruntime's ``quantize_dynamic`` with its defaults on plain exported graphs, and a Python loop."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.bench.peers.system import System, read_config

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PACKAGES", "ROOTS", "SYSTEM", "prepare"]

ROOTS: dict[str, tuple[str, ...]] = {"onnxruntime": (), "tokenizers": ()}
PACKAGES = ("onnxruntime", "torch", "transformers")


def prepare(student: Path, out: Path) -> dict[str, Any]:
    """Export plain graphs with torch, then quantize each with the defaults."""
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    from sbs_edge.bench.peers.plain_graphs import GRAPHS, export_plain

    logging.getLogger().setLevel(logging.ERROR)  # it advises pre-processing on every call
    with tempfile.TemporaryDirectory() as work:
        export_plain(student, Path(work))
        for name in GRAPHS:
            quantize_dynamic(Path(work) / f"{name}.onnx", out / f"{name}.onnx", weight_type=QuantType.QInt8)
    return {"files": ["."]}


class OnnxRuntimeInt8(System):
    """Three sessions; caches move through numpy."""

    precision = "int8"

    def open(self) -> None:
        """Load the graphs."""
        import onnxruntime

        from sbs_edge.bench.peers.plain_graphs import GRAPHS

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.spec.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        folder = Path(self.spec.artifact)
        self.sessions = {
            name: onnxruntime.InferenceSession(
                str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
            )
            for name in GRAPHS
        }
        self.inputs = {name: [i.name for i in s.get_inputs()] for name, s in self.sessions.items()}
        self.layers = int(read_config(self.spec.student)["num_decoder_layers"])

    def run(self, name: str, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One graph."""
        found: list[np.ndarray] = self.sessions[name].run(None, {k: feed[k] for k in self.inputs[name]})
        return found

    def _greedy(self, ids: list[list[int]], steps: int) -> tuple[np.ndarray, np.ndarray]:
        from sbs_edge.bench.peers.plain_graphs import greedy

        tokens, mask = self.padded(ids)
        return greedy(
            self.run,
            tokens,
            mask,
            layers=self.layers,
            steps=steps,
            start=self.spec.start,
            eos=self.spec.eos,
        )

    def generate(self, ids: list[list[int]], steps: int) -> list[list[int]]:
        """Greedy decoding."""
        return [self.cut(row) for row in self._greedy(ids, steps)[0].tolist()]

    def first_logits(self, ids: list[list[int]]) -> np.ndarray:
        """Logits of the first step."""
        return self._greedy(ids, 1)[1]


SYSTEM = OnnxRuntimeInt8
