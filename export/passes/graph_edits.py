"""What passes say about a graph, and how they change it. Values are onnx_ir's; shapes are those of `infer_shapes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

USER_INDEX = "user_index"

Attribute = int | float | str | Sequence[int]


def infer_shapes(model: ir.Model) -> None:
    """Of all values, in place: passes need ranks and the static dimensions."""
    ShapeInferencePass(data_prop=True)(model)


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """What the value always is; None where that depends on the inputs, or where there is no value."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def integers(value: ir.Value | None) -> list[int] | None:
    """Of a constant value, flat."""
    found = constant(value)
    return None if found is None else [int(number) for number in np.ravel(found)]


def attribute(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def static(value: ir.Value, axis: int) -> int | None:
    """The size of an axis, where it is the same for all inputs."""
    if value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes the value, if it is one of these ops."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in op_types and node.domain == "" else None


def used_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def axes_of(node: ir.Node, given_as: int = 1) -> list[int] | None:
    """The constant axes of a Reduce, Squeeze or Unsqueeze, none negative; None where they are not known."""
    if len(node.inputs) <= given_as or node.inputs[given_as] is None or node.inputs[0] is None:
        return None
    axes = integers(node.inputs[given_as])
    value = node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0]
    dims = rank(value)
    if axes is None or dims is None:
        return None
    return [axis % dims for axis in axes]


def user_gather(value: ir.Value | None) -> ir.Value | None:
    """x where the value is x's rows by `user_index`: one per candidate, out of one per user. Else None."""
    node = producer(value, "Gather")
    source = None if node is None else node.inputs[0]
    if node is None or source is None or not is_user_index(node.inputs[1]):
        return None
    axis = attribute(node, "axis", 0)
    return source if axis == 0 or axis == -(rank(source) or 0) else None


def is_user_index(value: ir.Value | None) -> bool:
    """The input itself, or a flat view of it, which the exporter makes of `index_select`."""
    while (node := producer(value, "Reshape", "Identity", "Cast")) is not None:
        if node.op_type == "Reshape" and integers(node.inputs[1]) != [-1]:
            return False
        value = node.inputs[0]
    return value is not None and value.is_graph_input() and value.name == USER_INDEX


class Edit:
    """Makes nodes before `place`, so that they stand where its inputs are there."""

    def __init__(self, graph: ir.Graph, place: ir.Node) -> None:
        self.graph, self.place = graph, place

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """The one output of a new node."""
        return self.node(op_type, inputs, 1, attributes)[0]

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, attributes: dict[str, Attribute]
    ) -> Sequence[ir.Value]:
        made = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        self.graph.insert_before(self.place, made)
        return made.outputs

    def like(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value]:
        """The outputs of the same operation on other inputs."""
        made = ir.node(node.op_type, inputs, dict(node.attributes), domain=node.domain, num_outputs=len(node.outputs))
        self.graph.insert_before(self.place, made)
        return made.outputs

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """A new initializer."""
        number = len(self.graph.initializers)
        while f"constant_{number}" in self.graph.initializers:
            number += 1
        tensor = ir.tensor(np.ascontiguousarray(array), name=f"constant_{number}")
        shape = ir.Shape(array.shape)
        value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def integers(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))


def replace(old: ir.Value, new: ir.Value) -> None:
    """In every use, as an output of the graph too: then the new value takes the name, by an Identity where it has one
    that has to stay."""
    place = old.producer()
    if old.is_graph_output() and place is not None and _has_its_name(new):
        assert isinstance(place.graph, ir.Graph)
        new = Edit(place.graph, place)("Identity", new)
    if old.is_graph_output():
        new.shape, new.type = old.shape, old.type
        old.name, new.name = f"{old.name}.before", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _has_its_name(value: ir.Value) -> bool:
    return value.is_graph_input() or value.is_graph_output() or value.is_initializer()


def drop_identities(model: ir.Model) -> None:
    """But for those that give an output of the graph its name."""
    for node in nodes_of(model):
        source = node.inputs[0] if node.op_type == "Identity" and not node.domain else None
        if source is not None and not node.outputs[0].is_graph_output():
            replace(node.outputs[0], source)


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    """As the graph is now: nodes may be added and replaced while this goes on. Only those whose outputs are read."""
    for node in list(model.graph):
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            yield node


def floats(value: ir.Value | None) -> NDArray[np.float32] | None:
    """As `constant`, of a float32 one."""
    found = constant(value)
    return None if found is None or found.dtype != np.float32 else found.astype(np.float32, copy=False)


def linear(node: ir.Node) -> tuple[ir.Value, NDArray[np.float32], ir.Value | None] | None:
    """(A, W [K, M], C) where the node is A @ W, or A @ W + C, with a constant W; else None."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.inputs[0] is None:
        return None
    weight = floats(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    if node.op_type == "MatMul":
        return node.inputs[0], weight, None
    scales = [node.attributes[name].as_float() if name in node.attributes else 1.0 for name in ("alpha", "beta")]
    if attribute(node, "transA", 0) or scales != [1.0, 1.0]:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return node.inputs[0], weight.T if attribute(node, "transB", 0) else weight, bias
