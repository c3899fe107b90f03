"""Operations that keep rows apart: row i of the output depends on row i of the inputs alone.

For these, taking rows before or after is the same: op(x[index]) = op(x)[index].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from export.passes.graph_edits import attribute, axes_of, constant, integers, rank, static

ELEMENTWISE = frozenset(
    ("Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
     "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less",
     "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal",
     "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh",
     "ThresholdedRelu", "Where", "Xor")
)  # fmt: skip
_REDUCTIONS = frozenset(
    ("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
     "ReduceSum", "ReduceSumSquare")
)  # fmt: skip
_DEFAULT_AXIS = {"Softmax": -1, "LogSoftmax": -1, "Hardmax": -1, "LayerNormalization": -1, "Split": 0, "Concat": 0}


def keeps_rows(node: ir.Node, moving: Sequence[bool]) -> bool:
    """Whether the node is row-wise in those inputs that `moving` marks; the others are the same for all rows."""
    values = [value for value, moves in zip(node.inputs, moving, strict=True) if moves and value is not None]
    others = [value for value, moves in zip(node.inputs, moving, strict=True) if not moves and value is not None]
    if node.domain or not values or any(rank(value) in (None, 0) for value in values):
        return False
    if node.op_type in ELEMENTWISE:
        return _elementwise(values, others)
    if node.op_type in _REDUCTIONS:
        return _other_axes(node, moving)
    if node.op_type in _DEFAULT_AXIS:
        axis = attribute(node, "axis", _DEFAULT_AXIS[node.op_type])
        everything = node.op_type != "Concat" or not others
        return moving[0] and everything and axis % _rank(values[0]) != 0
    rule = _RULES.get(node.op_type)
    return rule is not None and rule(node, moving)


def _rank(value: ir.Value) -> int:
    dims = rank(value)
    assert dims is not None
    return dims


def _elementwise(values: Sequence[ir.Value], others: Sequence[ir.Value]) -> bool:
    """Broadcasting lines axes up from the last: the rows have to be the first axis of all values that have rows, and
    the others must not have an axis there, or one of size 1."""
    dims = max(_rank(value) for value in values)
    if any(rank(value) != dims for value in values):
        return False
    for other in others:
        below = rank(other)
        if below is None or below > dims or (below == dims and static(other, 0) != 1):
            return False
    return True


def _matmul(node: ir.Node, moving: Sequence[bool]) -> bool:
    left, right = node.inputs
    if left is None or right is None:
        return False
    if moving == [True, False]:
        return _rank(left) >= 2 and rank(right) == 2
    return all(moving) and _rank(left) >= 3 and rank(left) == rank(right)


def _gemm(node: ir.Node, moving: Sequence[bool]) -> bool:
    if not moving[0] or moving[1] or attribute(node, "transA", 0):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return True
    return rank(bias) == 2 if moving[2] else rank(bias) in (0, 1) or static(bias, 0) == 1


def _other_axes(node: ir.Node, moving: Sequence[bool]) -> bool:
    """Axis 0 stays where it is."""
    axes = axes_of(node)
    return moving[0] and axes is not None and bool(axes) and 0 not in axes


def _slice(node: ir.Node, moving: Sequence[bool]) -> bool:
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 else None
    value = node.inputs[0]
    return moving[0] and axes is not None and value is not None and all(axis % _rank(value) for axis in axes)


def _transpose(node: ir.Node, moving: Sequence[bool]) -> bool:
    order = node.attributes.get("perm")
    return order is not None and next(iter(order.as_ints())) == 0


def _reshape(node: ir.Node, moving: Sequence[bool]) -> bool:
    """Row by row: what is behind axis 0 has the same, known, number of elements before and after."""
    value, shape = node.inputs[0], integers(node.inputs[1])
    if not moving[0] or value is None or shape is None or (attribute(node, "allowzero", 0) and 0 in shape):
        return False
    behind = [static(value, axis) for axis in range(1, _rank(value))]
    if any(size is None for size in behind) or len(shape) < 1:
        return False
    size, rest = math.prod(size for size in behind if size is not None), shape[1:]
    if any(part == 0 for part in rest):  # copies a size, perhaps of another place
        return False
    if shape[0] == 0 and rest.count(-1) == 1:
        return size % -math.prod(rest) == 0
    return shape[0] in (0, -1) and -1 not in rest and math.prod(rest) == size


def _gather(node: ir.Node, moving: Sequence[bool]) -> bool:
    """Columns by constant places."""
    value = node.inputs[0]
    if not moving[0] or moving[1] or value is None or constant(node.inputs[1]) is None:
        return False
    return attribute(node, "axis", 0) % _rank(value) != 0


def _flatten(node: ir.Node, moving: Sequence[bool]) -> bool:
    return attribute(node, "axis", 1) == 1


def _batch_norm(node: ir.Node, moving: Sequence[bool]) -> bool:
    value = node.inputs[0]
    return moving[0] and not any(moving[1:]) and value is not None and _rank(value) >= 2


_RULES = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Squeeze": _other_axes,
    "Unsqueeze": _other_axes,
    "Slice": _slice,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Gather": _gather,
    "Flatten": _flatten,
    "BatchNormalization": _batch_norm,
}
