"""A small builder for ONNX graphs: constants by value, nodes by name, subgraphs that share constants.

The module knows nothing of T5. Operators are standard (opset 23) unless a domain is given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sbs_edge import __version__

__all__ = ["CONTRIB", "FLOAT", "INT32", "INT64", "OPSET", "Graph", "Value", "all_graphs", "all_nodes"]

OPSET = 23
CONTRIB = "com.microsoft"
FLOAT, INT64, INT32, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL

Value = str
"""The name of a tensor in a graph."""

_SMALL = 64  # elements; larger constants are shared by digest


class Graph:
    """A graph, or the body of a loop, that is being built."""

    def __init__(self, parent: Graph | None = None, prefix: str = "") -> None:
        """Start a graph; with ``parent`` its constants and names are shared with it."""
        self.parent = parent
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.constants: dict[str, np.ndarray] = parent.constants if parent else {}
        self._by_value: dict[tuple[Any, ...], str] = parent._by_value if parent else {}
        self._memo: dict[tuple[Any, ...], Any] = {}
        self._count = 0

    def constant(self, value: Any, dtype: Any = None) -> Value:
        """Return the name of a constant; equal values are stored once."""
        array = np.ascontiguousarray(value, dtype=dtype) if np.ndim(value) else np.asarray(value, dtype=dtype)
        key = (array.shape, array.dtype.str, hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest())
        if key not in self._by_value:
            name = f"c{len(self.constants)}"
            self.constants[name] = array
            self._by_value[key] = name
        return self._by_value[key]

    def op(self, kind: str, *inputs: Any, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; inputs are names, ``""`` for an absent one, or values that become constants.

        Returns:
            The output's name, or a tuple of names when ``outputs`` is not 1.
        """
        names = [item if isinstance(item, str) else self.constant(item) for item in inputs]
        results = []
        for index in range(outputs):
            suffix = f"_{index}" if outputs > 1 else ""
            results.append(f"{self.prefix}{kind}_{self._count}{suffix}")
        self._count += 1
        self.nodes.append(helper.make_node(kind, names, results, domain=domain, **attributes))
        return results[0] if outputs == 1 else tuple(results)

    def named_outputs(
        self, kind: str, inputs: Sequence[Any], names: Sequence[str], **attributes: Any
    ) -> None:
        """Add a node whose output names are given; ``""`` leaves an optional output out."""
        resolved = [item if isinstance(item, str) else self.constant(item) for item in inputs]
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(kind, resolved, list(names), domain=domain, **attributes))

    def fresh(self, hint: str) -> Value:
        """Return a name that no node has yet."""
        self._count += 1
        return f"{self.prefix}{hint}_{self._count}"

    def once(self, key: tuple[Any, ...], make: Any) -> Any:
        """Return ``make()``, called only the first time that ``key`` is used in this graph."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> Value:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str], source: Value) -> None:
        """Declare an output with the value of ``source``."""
        self.nodes.append(helper.make_node("Identity", [source], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def body(self, prefix: str) -> Graph:
        """Start a subgraph (a loop's body) that sees this graph's tensors and shares its constants."""
        return Graph(parent=self, prefix=prefix)

    def as_proto(self, name: str) -> onnx.GraphProto:
        """Return the graph without constants, for a loop's body; :meth:`model` adds them."""
        return helper.make_graph(self.nodes, name, self.inputs, self.outputs)

    def model(self, name: str) -> onnx.ModelProto:
        """Return the whole model, constants included.

        A constant that only a loop's body uses is an initialiser of that body. The runtime's passes over int8
        weights look at a graph's own initialisers: they would not reach the body's products otherwise.
        Only operator sets that are used are declared, so a graph of standard operators declares only the standard.
        """
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == CONTRIB for node in all_nodes(graph)):
            opsets.append(helper.make_opsetid(CONTRIB, 1))
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=11, producer_name="sbs-edge", producer_version=__version__
        )
        homes = _homes(model.graph)
        for key, array in self.constants.items():
            # Filled in place, because a list of finished tensors would have gigabytes twice.
            tensor = homes.get(key, model.graph).initializer.add()
            tensor.name, tensor.data_type = key, helper.np_dtype_to_tensor_dtype(array.dtype)
            tensor.dims.extend(array.shape)
            tensor.raw_data = array.tobytes()
        return model


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the subgraphs inside, outer ones first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def _homes(graph: onnx.GraphProto) -> dict[str, onnx.GraphProto]:
    """Return, for every name that a node reads, the innermost graph that holds all its readers."""
    homes: dict[str, onnx.GraphProto] = {}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                for name, home in _homes(attribute.g).items():
                    homes[name] = graph if name in homes else home
    for node in graph.node:
        homes.update(dict.fromkeys(node.input, graph))
    return homes


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the subgraphs inside."""
    for inside in all_graphs(graph):
        yield from inside.node
