"""Columns apart: a product with constant weights, or a sum, over concatenated columns is a sum over the parts.

    [u, v] @ W = u @ W_u + v @ W_v          Σ over [u, v] = Σ over u + Σ over v

Users' columns become a part of their own, which `user_rows.py` computes once per user. U users, N candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from export.passes.graph_edits import (
    Edit,
    attribute,
    axes_of,
    constant,
    linear,
    nodes_of,
    rank,
    replace,
    static,
    user_gather,
)

# Adding a user's half costs as much as some columns of the product: it is read and written once per candidate.
_LEAST_COLUMNS = 16
_UNARY = frozenset(("Abs", "Cast", "Exp", "LeakyRelu", "Neg", "Relu", "Sigmoid", "Sqrt", "Tanh"))


class _Part(NamedTuple):
    value: ir.Value
    width: int

    @property
    def of_user(self) -> bool:
        return user_gather(self.value) is not None


def split_products(model: ir.Model) -> int:
    return sum(_split_product(model.graph, node) for node in nodes_of(model))


def split_sums(model: ir.Model) -> int:
    return sum(_split_sum(model.graph, node) for node in nodes_of(model))


def _split_product(graph: ir.Graph, node: ir.Node) -> bool:
    found = linear(node)
    if found is None:
        return False
    columns, weight, bias = found
    edit = Edit(graph, node)
    parts = _parts(columns, -1, edit)
    if parts is None or sum(part.width for part in parts) != len(weight):
        return False
    user_width = sum(part.width for part in parts if part.of_user)
    if not _LEAST_COLUMNS <= user_width < len(weight):
        return False
    if bias is not None and constant(bias) is None:
        return False
    ends = list(itertools.accumulate(part.width for part in parts))
    sides = []  # columns and their weights: the users', then the candidates'
    for of_user in (True, False):
        chosen = [(part, end) for part, end in zip(parts, ends, strict=True) if part.of_user == of_user]
        rows = np.concatenate([np.arange(end - part.width, end) for part, end in chosen])
        sides.append((_join(edit, [part.value for part, _ in chosen], -1), edit.constant(weight[rows])))
    if rank(columns) == 2:
        result = edit("Gemm", *sides[1], edit("Gemm", *sides[0], bias))
    else:
        result = edit("Add", edit("MatMul", *sides[1]), edit("MatMul", *sides[0]))
    replace(node.outputs[0], result)
    return True


def _join(edit: Edit, values: Sequence[ir.Value], axis: int) -> ir.Value:
    return values[0] if len(values) == 1 else edit("Concat", *values, axis=axis)


def _split_sum(graph: ir.Graph, node: ir.Node) -> bool:
    """ReduceSum along the axis of a Concat that has users' and candidates' parts."""
    value = node.inputs[0] if node.inputs else None
    axes = axes_of(node) if node.op_type == "ReduceSum" and not node.domain else None
    if value is None or axes is None or len(axes) != 1 or axes[0] == 0:
        return False
    edit = Edit(graph, node)
    parts = _parts(value, axes[0], edit)
    if parts is None or len({part.of_user for part in parts}) < 2:
        return False
    sides = [[part.value for part in parts if part.of_user == of_user] for of_user in (True, False)]
    sums = [edit.like(node, [_join(edit, side, axes[0]), *node.inputs[1:]])[0] for side in sides]
    replace(node.outputs[0], edit("Add", *sums))
    return True


def _parts(value: ir.Value, axis: int, edit: Edit) -> list[_Part] | None:
    """What stands side by side along `axis` in `value`, as values of their own; None where it is not a Concat.

    Looks through operations that keep columns apart, which are made anew on each part; those that nobody reads in the
    end are removed as unused.
    """
    node, dims = value.producer(), rank(value)
    if node is None or dims is None or node.domain:
        return None
    if node.op_type == "Concat" and attribute(node, "axis", 0) % dims == axis % dims:
        return _concatenated(node, axis, edit)
    if node.op_type in _UNARY:
        return _each(edit, node, axis, lambda part: edit.like(node, [part])[0])
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return _each(edit, node, axis, lambda part: edit.like(node, [part, part])[0])
    if node.op_type == "Pow" and (exponent := constant(node.inputs[1])) is not None and exponent.size == 1:
        return _each(edit, node, axis, lambda part: edit.like(node, [part, node.inputs[1]])[0])
    if node.op_type == "Reshape" and (dims, axis % dims) == (3, 1):
        return _fields(node, edit)
    return None


def _concatenated(node: ir.Node, axis: int, edit: Edit) -> list[_Part] | None:
    parts: list[_Part] = []
    for value in node.inputs:
        width = None if value is None else static(value, axis)
        if value is None or width is None:
            return None
        parts += _parts(value, axis, edit) or [_Part(value, width)]
    return parts


def _each(edit: Edit, node: ir.Node, axis: int, make: Callable[[ir.Value], ir.Value]) -> list[_Part] | None:
    """`make` of each part of the node's first input."""
    value, kind = node.inputs[0], node.outputs[0].type
    parts = None if value is None else _parts(value, axis, edit)
    if parts is None:
        return None
    return [_Part(_on_rows(edit, part.value, make, part.value.shape, kind), part.width) for part in parts]


def _fields(node: ir.Node, edit: Edit) -> list[_Part] | None:
    """[rows, F * D] as [rows, F, D], where every part has whole fields."""
    value, dim = node.inputs[0], static(node.outputs[0], 2)
    parts = None if value is None or rank(value) != 2 else _parts(value, 1, edit)
    if parts is None or dim is None or any(part.width % dim for part in parts):
        return None
    if (static(node.outputs[0], 1) or 0) * dim != sum(part.width for part in parts):
        return None  # rows run together
    return [_as_fields(edit, part, dim, node.outputs[0].type) for part in parts]


def _as_fields(edit: Edit, part: _Part, dim: int, kind: ir.TypeProtocol | None) -> _Part:
    fields = part.width // dim
    shape = edit.integers(-1, fields, dim)
    sizes = ir.Shape([None, fields, dim])
    made = _on_rows(edit, part.value, lambda columns: edit("Reshape", columns, shape), sizes, kind)
    return _Part(made, fields)


def _on_rows(
    edit: Edit,
    value: ir.Value,
    make: Callable[[ir.Value], ir.Value],
    shape: ir.Shape | None,
    kind: ir.TypeProtocol | None,
) -> ir.Value:
    """`make` of a value of which it is row-wise: where the rows are users', on those, taken afterwards."""
    source, node = user_gather(value), value.producer()
    made = make(value) if source is None or node is None else edit("Gather", make(source), node.inputs[1], axis=0)
    made.shape, made.type = shape, kind
    return made
