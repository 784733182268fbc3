"""Parse and build graphs with NVIDIA's own TensorRT-RTX, which needs no GPU for either.

This is a separate program with its own environment: it needs ``tensorrt-rtx`` and nothing of this project.
Each argument is a graph; shapes come from ``<graph>.profile.json`` beside it (input -> min, opt, max). It writes a JSON
document for each graph to standard output. The exit code is 1 if a graph is refused, and 2 if it cannot run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def check(trt: Any, graph: Path) -> dict[str, Any]:
    """Return the messages of the parser and the builder about ``graph``."""
    report: dict[str, Any] = {
        "graph": graph.name,
        "tensorrt_rtx": trt.__version__,
        "parsed": False,
        "built": False,
    }
    messages: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        """Collects warnings and errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message)

    logger = Log()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    report["parsed"] = bool(parser.parse_from_file(str(graph)))
    report["errors"] = [parser.get_error(i).desc() for i in range(parser.num_errors)]
    if report["parsed"]:
        report["layers"] = network.num_layers
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        shapes = json.loads(graph.with_name(graph.name + ".profile.json").read_text(encoding="utf-8"))
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            wanted = shapes[tensor.name]
            if tensor.is_shape_tensor:
                profile.set_shape_input(tensor.name, wanted["min"], wanted["opt"], wanted["max"])
            else:
                profile.set_shape(tensor.name, wanted["min"], wanted["opt"], wanted["max"])
        config.add_optimization_profile(profile)
        start = time.monotonic()
        engine = builder.build_serialized_network(network, config)
        report["built"] = engine is not None
        report["seconds"] = round(time.monotonic() - start, 2)
        report["engine_bytes"] = 0 if engine is None else int(engine.nbytes)
    report["errors"] += messages
    return report


def main(arguments: list[str] | None = None) -> int:
    """Check every graph named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "graphs", nargs="+", type=Path, help="ONNX files with <graph>.profile.json beside them"
    )
    given = parser.parse_args(arguments)
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        sys.stderr.write(
            f"tensorrt-rtx is not installed in this environment ({error}); make one with "
            "pip install -r constraints/tensorrt.txt\n"
        )
        return 2
    refused = 0
    for graph in given.graphs:
        report = check(trt, graph)
        refused += not report["built"]
        sys.stdout.write(json.dumps(report) + "\n")
        sys.stdout.flush()
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
