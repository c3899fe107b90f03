"""Duplicate subgraphs: what is computed twice from the same inputs, or by equal constants, is computed once."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateHashedInitializersPass,
    RemoveUnusedNodesPass,
)

from export.passes.graph_edits import drop_identities


def remove_duplicates(model: ir.Model) -> int:
    """Constants first: equal subgraphs often differ by no more than the names of equal constants."""
    before = model.graph.num_nodes()
    drop_identities(model)
    for tidy in (
        DeduplicateHashedInitializersPass(size_limit=1 << 24),
        CommonSubexpressionEliminationPass(),
        RemoveUnusedNodesPass(),
    ):
        tidy(model)
    return before - model.graph.num_nodes()
