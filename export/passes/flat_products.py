"""Products of [N, T, K] with constant weights as one Gemm over N * T rows, which ONNX Runtime fuses with what follows.

    relu(x @ W + c), x [N, T, K]   =   reshape(relu(gemm(reshape(x), W, reshape(c))))

c: a bias [M], or one per row [N, T, M]. It takes a Gemm with its addition and its activation as one operation, a MatMul
of three axes with neither. Reshapes of neighbouring layers cancel out.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.graph_edits import (
    Edit,
    constant,
    infer_shapes,
    integers,
    linear,
    nodes_of,
    producer,
    rank,
    replace,
    static,
)

_ACTIVATIONS = frozenset(("Relu", "Sigmoid", "Tanh", "LeakyRelu"))


def flatten_products(model: ir.Model) -> int:
    total = 0
    while True:
        infer_shapes(model)
        changed = sum(_flatten(model.graph, node) or _sink(model.graph, node) for node in nodes_of(model))
        if not changed:
            return total
        total += changed


def _flatten(graph: ir.Graph, node: ir.Node) -> bool:
    """Add(MatMul(x, W), c) as a Gemm between two Reshapes."""
    if node.op_type != "Add" or node.domain or rank(node.outputs[0]) != 3:
        return False
    keys, width = (static(node.outputs[0], axis) for axis in (1, 2))
    for place, value in enumerate(node.inputs):
        product, added = producer(value, "MatMul"), node.inputs[1 - place]
        found = None if product is None else linear(product)
        if found is None or product is None or added is None or keys is None or width is None:
            continue
        rows, weight, _ = found
        bias = constant(added)
        per_row = rank(added) == 3 and (static(added, 1), static(added, 2)) == (keys, width) and bias is None
        if weight.shape[1] != width or (per_row and 1 in (static(added, 0), static(rows, 0))):
            continue
        if rank(rows) != 3 or static(rows, 1) != keys or not (per_row or (bias is not None and bias.ndim == 1)):
            continue
        if per_row and producer(added, "MatMul") is not None:
            continue  # two products: the other one is as good
        edit = Edit(graph, node)
        flat = edit("Reshape", rows, edit.integers(-1, len(weight)))
        addend = edit("Reshape", added, edit.integers(-1, width)) if per_row else added
        result = edit("Gemm", flat, edit.constant(weight), addend)
        replace(node.outputs[0], edit("Reshape", result, edit.integers(-1, keys, width)))
        return True
    return False


def _sink(graph: ir.Graph, node: ir.Node) -> bool:
    """An activation before the Reshape instead of after it; a Reshape of a Reshape is one."""
    inner = producer(node.inputs[0], "Reshape") if node.inputs else None
    if inner is None or node.domain or inner.inputs[0] is None:
        return False
    edit = Edit(graph, node)
    if node.op_type in _ACTIVATIONS:
        active = edit.like(node, [inner.inputs[0]])[0]
        replace(node.outputs[0], edit("Reshape", active, inner.inputs[1]))
        return True
    if node.op_type != "Reshape" or 0 in (integers(node.inputs[1]) or [0]):
        return False
    source = inner.inputs[0]
    if integers(node.inputs[1]) == [-1, static(source, 1)] and rank(source) == 2:
        replace(node.outputs[0], source)
    else:
        replace(node.outputs[0], edit("Reshape", source, node.inputs[1]))
    return True
