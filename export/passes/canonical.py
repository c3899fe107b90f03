"""One way to write what torch writes in several, so that the passes behind this one need to know one way each.

GatherND(x, user_index [N, 1])            Gather(x, user_index)           x[user_index] beside index_select
Reshape(x, shape computed from x)         Reshape(x, constants)           scaled_dot_product_attention
Reshape, Transpose(0, 2, 1), Reshape      Transpose(0, 1, 3, 2)           of its keys
Tile(x, [1, T, 1])                        Expand                          q.repeat(1, T, 1)
Expand(x, ones)                           x
Slice or Split of a Concat                its parts                       columns taken out of the features again
"""

from __future__ import annotations

import itertools

import onnx_ir as ir

from export.passes.graph_edits import (
    Edit,
    attribute,
    constant,
    infer_shapes,
    integers,
    is_user_index,
    nodes_of,
    producer,
    rank,
    replace,
    static,
)


def write_canonically(model: ir.Model) -> int:
    total = 0
    while True:
        infer_shapes(model)
        changed = 0
        for node in nodes_of(model):
            rule = _RULES.get(node.op_type)
            changed += rule is not None and not node.domain and rule(Edit(model.graph, node), node)
        if not changed:
            return total
        total += changed


def _put(node: ir.Node, value: ir.Value) -> bool:
    output = node.outputs[0]
    if value.shape is None:
        value.shape, value.type = output.shape, output.type
    replace(output, value)
    return True


def _gather_nd(edit: Edit, node: ir.Node) -> bool:
    value, places = node.inputs
    index = producer(places, "Reshape", "Unsqueeze")
    if index is None or places is None or not is_user_index(index.inputs[0]) or attribute(node, "batch_dims", 0):
        return False
    if rank(places) != 2 or static(places, 1) != 1:
        return False
    return _put(node, edit("Gather", value, index.inputs[0], axis=0))


def _reshape(edit: Edit, node: ir.Node) -> bool:
    value, output = node.inputs[0], node.outputs[0]
    if value is None or output.shape is None:
        return False
    sizes = _sizes(output)
    if constant(node.inputs[1]) is None and sizes.count(-1) <= 1 and 0 not in sizes:
        return _put(node, edit("Reshape", value, edit.integers(*sizes)))
    turned = _turned(value, sizes)
    return turned is not None and _put(node, edit("Transpose", turned, perm=[0, 1, 3, 2]))


def _turned(value: ir.Value, sizes: list[int]) -> ir.Value | None:
    """x [A, B, C, D], where the value is x as [A * B, C, D] with C and D exchanged, and the sizes are [A, B, D, C]."""
    transpose = producer(value, "Transpose")
    inner = None if transpose is None else producer(transpose.inputs[0], "Reshape")
    if transpose is None or inner is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    source = inner.inputs[0]
    if source is None or rank(source) != 4 or len(sizes) != 4 or rank(inner.outputs[0]) != 3:
        return None
    _, b, c, d = _sizes(source)
    known = min(b, c, d) > 0 and _sizes(inner.outputs[0])[1:] == [c, d]
    return source if known and sizes[1:] == [b, d, c] else None


def _tile(edit: Edit, node: ir.Node) -> bool:
    """Of a single key, over all of them."""
    value, repeats = node.inputs[0], integers(node.inputs[1])
    if value is None or repeats is None or len(repeats) != 3 or (repeats[0], repeats[2]) != (1, 1):
        return False
    return static(value, 1) == 1 and _put(node, edit("Expand", value, edit.integers(*repeats)))


def _expand(edit: Edit, node: ir.Node) -> bool:
    value, shape = node.inputs[0], integers(node.inputs[1])
    if value is None or not shape or set(shape) != {1} or rank(value) is None or len(shape) > (rank(value) or 0):
        return False
    return _put(node, value)


def _slice(edit: Edit, node: ir.Node) -> bool:
    starts, ends, axes, steps = (integers(node.inputs[k]) if k < len(node.inputs) else None for k in range(1, 5))
    if not starts or not ends or not axes or len(axes) != 1 or steps not in (None, [1]):
        return False
    return _take(edit, node, axes[0], [(starts[0], ends[0])])


def _split(edit: Edit, node: ir.Node) -> bool:
    axis = attribute(node, "axis", 0)
    widths = [static(output, axis) for output in node.outputs]
    known = [width for width in widths if width is not None]
    if len(known) < len(widths):
        return False
    bounds = [0, *itertools.accumulate(known)]
    return _take(edit, node, axis, list(itertools.pairwise(bounds)))


def _take(edit: Edit, node: ir.Node, axis: int, spans: list[tuple[int, int]]) -> bool:
    """Each output, from its span's start to its end, out of the parts of the Concat that the node reads."""
    concat, dims = producer(node.inputs[0], "Concat"), rank(node.outputs[0])
    if concat is None or not dims or attribute(concat, "axis", 0) % dims != axis % dims:
        return False
    widths = [None if part is None else static(part, axis) for part in concat.inputs]
    known = [width for width in widths if width is not None]
    total = sum(known)
    if len(known) < len(widths) or any(start < 0 for start, _ in spans):
        return False
    places = list(itertools.pairwise([0, *itertools.accumulate(known)]))
    for output, (start, end) in zip(node.outputs, spans, strict=True):
        parts = []
        last = min(end, total) if end >= 0 else end + total
        for part, (first, after) in zip(concat.inputs, places, strict=True):
            low, high = max(start, first) - first, min(last, after) - first
            if part is not None and low < high:
                span = (edit.integers(low), edit.integers(high), edit.integers(axis % dims))
                parts.append(part if (low, high) == (0, after - first) else edit("Slice", part, *span))
        if not parts:
            return False
        taken = parts[0] if len(parts) == 1 else edit("Concat", *parts, axis=axis % dims)
        if taken.shape is None:
            taken.shape, taken.type = output.shape, output.type
        replace(output, taken)
    return True


def _sizes(value: ir.Value) -> list[int]:
    """Of the axes; -1 where it differs by request."""
    return [] if value.shape is None else [size if isinstance(size, int) else -1 for size in value.shape]


_RULES = {
    "GatherND": _gather_nd,
    "Reshape": _reshape,
    "Tile": _tile,
    "Expand": _expand,
    "Slice": _slice,
    "Split": _split,
}
