"""User rows once: what depends on user inputs alone is computed for U users, not for N candidates.

The exporter's graph takes user rows by `user_index` at once and computes on N rows. Here the taking moves down, behind
every row-wise operation, by op(x[index]) = op(x)[index], until it meets rows of the candidates. Where it meets them in
a Concat before a product with constant weights, `columns.py` goes on.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.columns import split_products, split_sums
from export.passes.duplicates import remove_duplicates
from export.passes.graph_edits import Edit, infer_shapes, nodes_of, replace, user_gather
from export.passes.row_wise import keeps_rows


def split_user_rows(model: ir.Model) -> int:
    """Until nothing moves any more; returns how many nodes moved to U rows or were split."""
    total = 0
    while True:
        infer_shapes(model)
        moved = sum(_sink(model.graph, node) for node in nodes_of(model))
        moved = moved or split_sums(model) or split_products(model)
        if not moved:
            break
        total += moved
    remove_duplicates(model)  # products of the same columns have each made a Concat of them
    return total


def _sink(graph: ir.Graph, node: ir.Node) -> bool:
    """Takes the rows after the node instead of before it, where all its rows are users'."""
    sources = [user_gather(value) for value in node.inputs]
    index = next((_index(value) for value, source in zip(node.inputs, sources, strict=True) if source), None)
    if index is None or _other_rows(node, sources) or not keeps_rows(node, [source is not None for source in sources]):
        return False
    edit = Edit(graph, node)
    inputs = [value if source is None else source for value, source in zip(node.inputs, sources, strict=True)]
    for old, new in zip(node.outputs, edit.like(node, inputs), strict=True):
        taken = edit("Gather", new, index, axis=0)
        # One use may come before the others' shapes are known again: both have the ranks of the old one.
        new.shape, new.type = _rows_unknown(old), old.type
        taken.shape, taken.type = old.shape, old.type
        replace(old, taken)
    return True


def _index(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    return None if node is None else node.inputs[1]


def _other_rows(node: ir.Node, sources: list[ir.Value | None]) -> bool:
    """Whether an input that is no user's has rows of its own: everything but constants may."""
    return any(
        value is not None and source is None and ir.convenience.get_const_tensor(value) is None
        for value, source in zip(node.inputs, sources, strict=True)
    )


def _rows_unknown(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([None, *value.shape[1:]])
