"""Runs the graph passes, one after another, and keeps each only where its graph gives the scores of the one before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from export.bundle import PassReport
from export.passes import PASSES, GraphPass
from export.proof import Proof
from export.variants import medians_ms


def optimize(
    model: onnx.ModelProto,
    *,
    without: Collection[str] = (),
    passes: Sequence[GraphPass] = PASSES,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[onnx.ModelProto, tuple[PassReport, ...]]:
    """The optimised graph, and what became of each pass. `model` stays as it is.

    without: names of passes to leave out; raises ValueError for one that there is not. A pass that fails, or whose
    graph is invalid or gives other probabilities, is left out, with the reason in its report and told.
    """
    check_pass_names(without, passes)
    proof = Proof(model)
    steps = []  # of each pass: the graphs before and after it, its rewrites, why it was left out
    for graph_pass in passes:
        before, rewrites = proof, 0
        left_out: str | None = "switched off"
        if graph_pass.name not in without:
            left_out, rewrites, proof = _try(graph_pass, before)
        if left_out:
            tell(f"pass {graph_pass.name} is left out: {left_out}")
        steps.append((graph_pass.name, before, proof, rewrites, left_out))
    graphs = list(dict.fromkeys([*(before for _, before, _, _, _ in steps), proof]))
    taken = medians_ms({str(number): graph.session for number, graph in enumerate(graphs)})
    latency = {graph: taken[str(number)] for number, graph in enumerate(graphs)}
    return proof.model, tuple(
        PassReport(
            name=name,
            rewrites=rewrites,
            nodes=(before.nodes, after.nodes),
            flops=(before.flops, after.flops),
            latency_ms=(latency[before], latency[after]),
            max_abs_diff=after.difference(before),
            left_out=left_out,
        )
        for name, before, after, rewrites, left_out in steps
    )


def check_pass_names(without: Collection[str], passes: Sequence[GraphPass]) -> None:
    """Raises ValueError for a name in `without` that no pass has."""
    unknown = sorted(set(without) - {graph_pass.name for graph_pass in passes})
    if unknown:
        names = ", ".join(graph_pass.name for graph_pass in passes) or "none"
        raise ValueError(f"there is no graph pass {unknown[0]!r}; there are: {names}")


def _try(graph_pass: GraphPass, before: Proof) -> tuple[str | None, int, Proof]:
    """Why the pass is left out (None: it is not), how often it rewrote, and the graph to go on with."""
    try:
        model = ir.from_proto(before.model)
        rewrites = graph_pass.apply(model)
        if not rewrites:
            return None, 0, before
        after = Proof(tidied(model), before.feeds)
    except Exception as error:  # noqa: BLE001 - a pass that fails must not cost the export; the reason is reported
        return f"{type(error).__name__}: {error}", 0, before
    wrong = after.refuted(before)
    return (None, rewrites, after) if wrong is None else (wrong, 0, before)


def tidied(model: ir.Model) -> onnx.ModelProto:
    """Without what nobody reads, in order, every node named, checked."""
    TopologicalSortPass()(model)
    RemoveUnusedNodesPass()(model)
    for number, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{number}"
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]  # shapes from before the pass; ONNX Runtime infers them anew
    onnx.checker.check_model(proto, full_check=True)
    return proto
