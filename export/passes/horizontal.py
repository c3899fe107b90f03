"""Horizontal fusion: products side by side that share an input become one, and a Split.

    x @ W_1 + b_1, x @ W_2 + b_2   =   split(x @ [W_1, W_2] + [b_1, b_2])       narrow ones: gates, heads
    G_1 @ E, G_2 @ E               =   split([G_1; G_2] @ E)                   mixtures of the same experts, per row

Only where it is faster (scripts/bench/export_fusions.py). A product of fewer than 32 columns leaves most of a kernel's
registers empty. From there on it is as fast alone, its output stays in a nearer cache, and the Split only costs; and a
stack of experts as one batched product is slower than one product each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.passes.graph_edits import Edit, constant, infer_shapes, linear, nodes_of, rank, replace, static

_NARROW = 32  # columns


def fuse_products(model: ir.Model) -> int:
    infer_shapes(model)
    return _fuse_narrow(model) + _fuse_mixtures(model)


def _fuse_narrow(model: ir.Model) -> int:
    groups: dict[tuple[int, bool], list[ir.Node]] = defaultdict(list)
    for node in nodes_of(model):
        found = linear(node)
        if found is None or found[1].shape[1] >= _NARROW or rank(found[0]) != 2:
            continue
        bias = constant(found[2])
        if found[2] is None or (bias is not None and bias.shape == found[1].shape[1:]):
            groups[id(found[0]), found[2] is None].append(node)
    return sum(_fuse_columns(model.graph, nodes) for nodes in groups.values() if len(nodes) > 1)


def _fuse_columns(graph: ir.Graph, nodes: Sequence[ir.Node]) -> int:
    """Gemms of one input, all with a bias or all without."""
    found = [parts for node in nodes if (parts := linear(node)) is not None]
    edit = Edit(graph, nodes[0])
    weight = edit.constant(np.concatenate([weight for _, weight, _ in found], axis=1))
    biases = [bias for _, _, part in found if (bias := constant(part)) is not None]
    joined = edit("Gemm", found[0][0], weight, edit.constant(np.concatenate(biases)) if biases else None)
    _split(edit, joined, nodes, [weight.shape[1] for _, weight, _ in found])
    return len(nodes) - 1


def _fuse_mixtures(model: ir.Model) -> int:
    """MatMul(G [N, a, E], X [N, E, D]) of one X, which is no constant."""
    groups: dict[tuple[int, bool, int | None], list[ir.Node]] = defaultdict(list)
    for node in nodes_of(model):
        if node.op_type != "MatMul" or node.domain or constant(node.inputs[1]) is not None:
            continue
        left, right = node.inputs
        if left is not None and right is not None and rank(left) == rank(right) == 3 and static(left, 1) is not None:
            groups[id(right), static(left, 0) == 1, static(left, 2)].append(node)
    return sum(_fuse_rows(model.graph, _independent(nodes)) for nodes in groups.values())


def _independent(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Those of the nodes of which none needs another's output, also where the graph is no longer in order."""
    chosen: dict[int, set[int]] = {}  # node -> all that it needs
    found = []
    for node in nodes:
        needed = _needed_by(node)
        if not needed & chosen.keys() and not any(id(node) in others for others in chosen.values()):
            chosen[id(node)] = needed
            found.append(node)
    return found


def _needed_by(node: ir.Node) -> set[int]:
    """All nodes that the node's inputs come from."""
    found: set[int] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            source = None if value is None else value.producer()
            if source is not None and id(source) not in found:
                found.add(id(source))
                waiting.append(source)
    return found


def _fuse_rows(graph: ir.Graph, nodes: Sequence[ir.Node]) -> int:
    if len(nodes) < 2:
        return 0
    heights = [static(node.inputs[0], 1) or 0 for node in nodes if node.inputs[0] is not None]
    edit = Edit(graph, nodes[-1])  # where all left sides are there
    joined = edit("MatMul", edit("Concat", *(node.inputs[0] for node in nodes), axis=1), nodes[0].inputs[1])
    _split(edit, joined, nodes, heights)
    return len(nodes) - 1


def _split(edit: Edit, joined: ir.Value, nodes: Sequence[ir.Node], sizes: Sequence[int]) -> None:
    parts = edit.node("Split", [joined, edit.integers(*sizes)], len(nodes), {"axis": 1})
    for node, part in zip(nodes, parts, strict=True):
        replace(node.outputs[0], part)
