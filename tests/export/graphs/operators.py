"""The operators that a session really runs, and their input types, from onnxruntime's own profile.

File sizes prove nothing: the CPU provider folds int8 weights with a plain dequantisation back to float32.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

__all__ = ["INT8_PRODUCTS", "executed_operators"]

INT8_PRODUCTS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "QGemm")


def executed_operators(
    model: onnx.ModelProto | str | Path,
    feeds: Mapping[str, np.ndarray],
    provider: str = "CPUExecutionProvider",
) -> Counter[str]:
    """Run once under the profiler and return how often every operator ran, after the runtime's rewrites.

    A float product is counted as ``MatMul[float]``, so that what was meant to be int8 cannot hide.
    """
    from sbs_edge.runtime.ort import onnxruntime_module

    onnxruntime = onnxruntime_module()

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        source = str(model) if isinstance(model, str | Path) else model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=[provider])
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    counts: Counter[str] = Counter()
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            operator = arguments["op_name"]
            if operator in ("MatMul", "Gemm", "FusedMatMul"):
                types = arguments.get("input_type_shape") or [{}]
                operator += f"[{next(iter(types[0]), '?')}]"
            counts[operator] += 1
    return counts
