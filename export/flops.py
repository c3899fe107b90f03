"""Floating-point operations of a graph: what passes save, counted without running anything."""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx

# Operations per element of the output, where that is not one. Those that only move data take none.
_PER_ELEMENT = {"Softmax": 5, "LogSoftmax": 5, "Sigmoid": 4, "Tanh": 4, "Exp": 4, "Erf": 8, "Gelu": 8, "Pow": 1}
_FREE = frozenset(
    ("Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Range", "Reshape",
     "Shape", "Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)  # fmt: skip
_OF_INPUT = frozenset(
    ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
     "ReduceSum", "ReduceSumSquare")
)  # fmt: skip
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_NORMALISATIONS = {"LayerNormalization": 8, "BatchNormalization": 2}


def count_flops(model: onnx.ModelProto, *, users: int, candidates: int) -> int:
    """For one run with U = `users` and N = `candidates`. A multiplication and an addition are two operations."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    _fix_dimensions(fixed, {"U": users, "N": candidates})
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    shapes = _shapes(inferred.graph)
    return sum(_of_node(node, shapes) for node in inferred.graph.node)


def _fix_dimensions(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
    return shapes


def _of_node(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if node.op_type in _FREE or not node.output:
        return 0
    size = math.prod(shapes.get(node.output[0], (0,)))
    if node.op_type in ("MatMul", "Gemm"):
        inner = shapes.get(node.input[0], (0,))[-1]
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Gemm" and attributes.get("transA"):
            inner = shapes.get(node.input[0], (0,))[0]
        return size * (2 * inner + (node.op_type == "Gemm" and len(node.input) > 2))
    if node.op_type == "Einsum":
        return 2 * _loops(node, shapes)
    if node.op_type in _GATES:
        steps, batch, *_ = shapes.get(node.input[0], (0, 0))
        directions, hidden_gates, inner = shapes.get(node.input[1], (0, 0, 0))
        return 2 * steps * batch * directions * hidden_gates * (inner + hidden_gates // _GATES[node.op_type])
    if node.op_type in _NORMALISATIONS:
        return size * _NORMALISATIONS[node.op_type]
    if node.op_type in _OF_INPUT:
        return math.prod(shapes.get(node.input[0], (0,)))
    return size * _PER_ELEMENT.get(node.op_type, 1)


def _loops(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How often the innermost line of an Einsum, written as loops over all its letters, is run."""
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        shape = shapes.get(name, ())
        sizes |= zip(term.replace("...", "")[::-1], shape[::-1], strict=False)
    return math.prod(sizes.values())
