"""Constants put into a graph, with the onnx package as the judge."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from sbs_edge.errors import IntegrityError
from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.external_data import external_locations, inlined


def _tensors(graph: onnx.GraphProto) -> dict[str, bytes]:
    found = {tensor.name: tensor.raw_data for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found |= {f"{node.name}/{name}": data for name, data in _tensors(attribute.g).items()}
    return found


@pytest.mark.parametrize("target", ["cpu-fp32", "cpu-int8"])
def test_a_graph_with_its_constants_inside_is_what_onnx_loads(tiny_bundle: Path, target: str) -> None:
    bundle, in_loops = Bundle.open(tiny_bundle), 0
    graphs = sorted(
        name for name in bundle.manifest["files"] if name.startswith(target) and name.endswith(".onnx")
    )
    assert graphs
    for name in graphs:
        whole = inlined(*bundle.read_graph(name))
        assert external_locations(whole, name) == set()
        found = _tensors(onnx.load_from_string(whole).graph)
        assert found == _tensors(onnx.load(tiny_bundle / name).graph)
        in_loops += sum("/" in tensor for tensor in found)
    assert in_loops > 0


def test_constants_outside_their_file_are_refused(tiny_bundle: Path) -> None:
    content, constants = Bundle.open(tiny_bundle).read_graph("cpu-fp32/explainer.onnx")
    assert constants
    with pytest.raises(IntegrityError, match="export the bundle again"):
        inlined(content, {name: held[:-1000] for name, held in constants.items()})
    with pytest.raises(IntegrityError, match="export the bundle again"):
        inlined(content, {})
