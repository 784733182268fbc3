"""optimum's ONNX export, quantized dynamically to int8 as its guide says, run by its ORT class."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from sbs_edge.bench.peers.transformers import Transformers

__all__ = ["PACKAGES", "ROOTS", "SYSTEM", "prepare"]

ROOTS: dict[str, tuple[str, ...]] = {"optimum": ("onnxruntime",), "optimum-onnx": ("onnxruntime",)}
PACKAGES = ("optimum", "optimum-onnx", "onnxruntime", "transformers")


def prepare(student: Path, out: Path) -> dict[str, Any]:
    """Export with cache, then ``avx512_vnni`` dynamic quantization per channel of every graph."""
    from optimum.onnxruntime import ORTModelForSeq2SeqLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    with tempfile.TemporaryDirectory() as work:
        model = ORTModelForSeq2SeqLM.from_pretrained(
            student, export=True, use_merged=False, local_files_only=True
        )
        model.save_pretrained(work)
        recipe = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        for graph in sorted(Path(work).glob("*.onnx")):
            ORTQuantizer.from_pretrained(work, file_name=graph.name).quantize(
                save_dir=out, quantization_config=recipe, file_suffix=""
            )
        for name in ("config.json", "generation_config.json"):
            (out / name).write_bytes((Path(work) / name).read_bytes())
    return {"files": ["."]}


class Optimum(Transformers):
    """``ORTModelForSeq2SeqLM.generate``."""

    precision = "int8"

    def open(self) -> None:
        """Load the three quantized graphs."""
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForSeq2SeqLM

        torch.set_num_threads(self.spec.threads)
        self.torch = torch
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.spec.threads
        options.log_severity_level = 3
        self.model = ORTModelForSeq2SeqLM.from_pretrained(
            self.spec.artifact,
            provider="CPUExecutionProvider",
            session_options=options,
            use_merged=False,
            local_files_only=True,
        )


SYSTEM = Optimum
