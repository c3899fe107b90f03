"""Target attention: the first layer over [q, k, q - k, q ∘ k] without a product per pair for what is not of a pair.

    [q, k, q - k, q ∘ k] @ [W_1; W_2; W_3; W_4] + b
        = (q @ (W_1 + W_3) + b)                          once per query     [N, 1, M]
        + k @ (W_2 - W_3)                                once per key       [U, T, M] where the keys are a user's
        + (q ∘ k) @ W_4                                  once per pair      [N, T, M]

Any Concat before a product with constant weights is looked at so: its parts as sums and differences of sources, each of
which is then multiplied once, by the sum of its weights. N candidates, U users, T time, M the layer's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.passes.graph_edits import (
    Edit,
    attribute,
    constant,
    infer_shapes,
    linear,
    nodes_of,
    producer,
    rank,
    replace,
    static,
    used_once,
    user_gather,
)


def split_target_attention(model: ir.Model) -> int:
    infer_shapes(model)
    return sum(_drop_expand(node) for node in nodes_of(model)) + sum(
        _split(model.graph, node) for node in nodes_of(model)
    )


@dataclass
class _Source:
    """One value that is multiplied, and by what."""

    value: ir.Value
    weight: NDArray[np.float32]
    once: bool  # per query or per user, not per pair

    @property
    def columns(self) -> int:
        return len(self.weight)


def _drop_expand(node: ir.Node) -> bool:
    """x ∘ y broadcasts: the query needs no copy per key for it."""
    if node.op_type not in ("Mul", "Sub", "Add") or node.domain:
        return False
    dropped = False
    for place, value in enumerate(node.inputs):
        small, other = _expanded(value), node.inputs[1 - place]
        if small is not None and other is not None and _covers(other, small, node.outputs[0]):
            node.replace_input_with(place, small)
            dropped = True
    return dropped


def _expanded(value: ir.Value | None) -> ir.Value | None:
    """x where the value is x, [N, 1, D], for every key, [N, T, D]."""
    node = producer(value, "Expand")
    small = None if node is None else node.inputs[0]
    if node is None or small is None or rank(small) != rank(node.outputs[0]) or rank(small) != 3:
        return None
    return small if static(small, 1) == 1 and (static(node.outputs[0], 1) or 0) > 1 else None


def _covers(other: ir.Value, small: ir.Value, result: ir.Value) -> bool:
    """Whether small with other has the shape of the expanded one with other: other has the keys' axis."""
    if _expanded(other) is not None or rank(other) != rank(small) or 1 in (static(other, 0), static(small, 0)):
        return False
    return static(other, 1) == static(result, 1) and static(other, 2) == static(small, 2) == static(result, 2)


def _split(graph: ir.Graph, node: ir.Node) -> bool:
    found = linear(node)
    concat = None if found is None else producer(found[0], "Concat")
    if found is None or concat is None or rank(concat.outputs[0]) != 3 or attribute(concat, "axis", 0) not in (-1, 2):
        return False
    sources = _sources(concat, found[1])
    if sources is None or sum(source.columns for source in sources if not source.once) >= len(found[1]):
        return False
    keys = static(concat.outputs[0], 1)
    if not any(static(source.value, 1) == keys for source in sources):
        return False  # one that is there for every key gives the sum its shape
    added = _bias_add(node)
    edit = Edit(graph, node if added is None else added[0])
    per_pair = [source for source in sources if not source.once]
    terms = [edit("MatMul", source.value, edit.constant(source.weight)) for source in sources if source.once]
    if added is not None:
        terms = [edit("Add", terms[0], added[1]), *terms[1:]] if terms else [added[1]]
    if per_pair:
        values = [source.value for source in per_pair]
        pairs = values[0] if len(values) == 1 else edit("Concat", *values, axis=-1)
        weight = edit.constant(np.concatenate([source.weight for source in per_pair]))
        terms.append(edit("MatMul", pairs, weight))
    total = terms[0]
    for term in terms[1:]:
        total = edit("Add", term, total)
    replace((node if added is None else added[0]).outputs[0], total)
    return True


def _bias_add(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a constant vector behind the product, where that is its only use, and the vector."""
    if not used_once(node.outputs[0]):
        return None
    (use,) = node.outputs[0].uses()
    user = use.node
    if user.op_type != "Add" or user.domain:
        return None
    bias = user.inputs[1 - use.idx]
    vector = constant(bias)
    return (user, bias) if bias is not None and vector is not None and vector.ndim <= 1 else None


def _sources(concat: ir.Node, weight: NDArray[np.float32]) -> list[_Source] | None:
    """What the columns are made of, those that are needed once first; None where a width is not known.

    A difference is taken apart only where both sides are parts as well: else it would take two products, not one.
    """
    parts = {id(_source(value)) for value in concat.inputs}
    found: dict[int, _Source] = {}
    start = 0
    for value in concat.inputs:
        width = None if value is None else static(value, -1)
        if value is None or width is None:
            return None
        rows = weight[start : start + width]
        start += width
        for source, sign in _terms(value, parts):
            known = found.setdefault(id(source), _Source(source, np.zeros_like(rows), _is_once(source, concat)))
            known.weight = known.weight + sign * rows
    if start != len(weight):
        return None
    return sorted(found.values(), key=lambda source: not source.once)


def _source(value: ir.Value | None) -> ir.Value | None:
    return _expanded(value) or value


def _terms(value: ir.Value, parts: set[int]) -> list[tuple[ir.Value, int]]:
    """The value as a sum of sources with signs."""
    node = producer(value, "Sub", "Add")
    if node is not None:
        sides = [_source(side) for side in node.inputs]
        known = [side for side in sides if side is not None and id(side) in parts]
        if len(known) == 2 and all(static(side, -1) == static(value, -1) for side in known):
            return [(known[0], 1), (known[1], -1 if node.op_type == "Sub" else 1)]
    source = _source(value)
    assert source is not None
    return [(source, 1)]


def _is_once(source: ir.Value, concat: ir.Node) -> bool:
    keys = static(concat.outputs[0], 1)
    return user_gather(source) is not None or (static(source, 1) == 1 and keys != 1)
