"""What is the same for all requests is computed now: constants, dead code, batch normalisation.

BN(x) = a ∘ x + c,  a = scale / √(variance + ε),  c = shift - a ∘ mean
BN(x @ W + b)  = x @ (W ∘ a) + (a ∘ b + c)            behind a product
BN(x) @ W + b  = x @ (diag(a) W) + (c @ W + b)        before one
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants

from export.passes.graph_edits import (
    Edit,
    drop_identities,
    floats,
    infer_shapes,
    linear,
    nodes_of,
    producer,
    rank,
    replace,
    used_once,
)

Affine = tuple[NDArray[np.float64], NDArray[np.float64]]


def fold(model: ir.Model) -> int:
    """Returns how many products took a normalisation in, and how many other nodes are gone."""
    infer_shapes(model)
    folded = sum(_fold_behind(model.graph, node) for node in nodes_of(model))
    RemoveUnusedNodesPass()(model)
    folded += sum(_fold_before(model.graph, node) for node in nodes_of(model))
    RemoveUnusedNodesPass()(model)
    before = model.graph.num_nodes()
    fold_constants(model)
    drop_identities(model)
    RemoveUnusedNodesPass()(model)
    return folded + max(0, before - model.graph.num_nodes())


def _affine(node: ir.Node | None) -> Affine | None:
    """a, c of an inference-time BatchNormalization of [N, C] with constant statistics, both [C]."""
    if node is None or node.op_type != "BatchNormalization" or node.inputs[0] is None or rank(node.inputs[0]) != 2:
        return None
    scale, shift, mean, variance = (floats(value) for value in node.inputs[1:5])
    if scale is None or shift is None or mean is None or variance is None:
        return None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    a = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    return a, shift - a * mean


def _constant_product(node: ir.Node | None) -> tuple[ir.Value, NDArray[np.float32], NDArray[np.float32]] | None:
    """x, W, b, where the node is x @ W + b with constants; b is zeros where it has none."""
    found = None if node is None else linear(node)
    if found is None:
        return None
    rows, weight, added = found
    bias = np.zeros(weight.shape[1], np.float32) if added is None else floats(added)
    return None if bias is None else (rows, weight, bias)


def _fold_behind(graph: ir.Graph, node: ir.Node) -> bool:
    affine = _affine(node)
    product = producer(node.inputs[0], "Gemm", "MatMul") if affine else None
    found = _constant_product(product)
    if affine is None or found is None or product is None or not used_once(product.outputs[0]):
        return False
    rows, weight, bias = found
    a, c = affine
    _replace_product(graph, node, rows, weight * a, a * bias + c)
    return True


def _fold_before(graph: ir.Graph, node: ir.Node) -> bool:
    found = _constant_product(node)
    norm = producer(found[0], "BatchNormalization") if found else None
    affine = _affine(norm)
    if found is None or norm is None or affine is None or norm.inputs[0] is None:
        return False
    _, weight, bias = found
    a, c = affine
    _replace_product(graph, node, norm.inputs[0], a[:, np.newaxis] * weight, c @ weight.astype(np.float64) + bias)
    return True


def _replace_product(
    graph: ir.Graph, node: ir.Node, rows: ir.Value, weight: NDArray[np.float64], bias: NDArray[np.float64]
) -> None:
    edit = Edit(graph, node)
    product = edit("Gemm", rows, edit.constant(weight.astype(np.float32)), edit.constant(bias.astype(np.float32)))
    product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
    replace(node.outputs[0], product)
