"""Runs the graph passes, one after another, and keeps each only where its graph gives the scores of the one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from export.bundle import PassReport
from export.example_inputs import Feed, in_memory, random_feed
from export.flops import count_flops
from export.passes import PASSES, GraphPass

TOLERANCE = 1e-5  # of a probability, between the graphs before and after a pass
TYPICAL = {"users": 1, "candidates": 500}  # the request that FLOPs and latency are of
_EXAMPLES = ((1, 1), (1, 64), (3, 41), (8, 8))  # users, candidates
_TIMED_RUNS = 15


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
    proof = _Proof(model)
    steps = []  # of each pass: the graphs before and after it, its rewrites, why it was left out
    for graph_pass in passes:
        before, rewrites = proof, 0
        left_out: str | None = "switched off"
        if graph_pass.name not in without:
            left_out, rewrites, proof = _try(graph_pass, before)
        if left_out:
            tell(f"pass {graph_pass.name} is left out: {left_out}")
        steps.append((graph_pass.name, before, proof, rewrites, left_out))
    _time([before for _, before, _, _, _ in steps] + [proof])
    return proof.model, tuple(_report(*step) for step in steps)


def _report(name: str, before: _Proof, after: _Proof, rewrites: int, left_out: str | None) -> PassReport:
    return PassReport(
        name=name,
        rewrites=rewrites,
        nodes=(before.nodes, after.nodes),
        flops=(before.flops, after.flops),
        latency_ms=(before.latency_ms, after.latency_ms),
        max_abs_diff=after.difference(before),
        left_out=left_out,
    )


def check_pass_names(without: Collection[str], passes: Sequence[GraphPass]) -> None:
    """Raises ValueError for a name in `without` that no pass has."""
    unknown = sorted(set(without) - {graph_pass.name for graph_pass in passes})
    if unknown:
        names = ", ".join(graph_pass.name for graph_pass in passes) or "none"
        raise ValueError(f"there is no graph pass {unknown[0]!r}; there are: {names}")


class _Proof:
    """A graph, its outputs for a few random inputs, and its figures."""

    def __init__(self, model: onnx.ModelProto, feeds: Sequence[Feed] | None = None) -> None:
        self.model = model
        self._session = in_memory(model)
        self._inputs = {node.name for node in self._session.get_inputs()}
        if feeds is None:
            feeds = [
                random_feed(self._session.get_inputs(), users=users, candidates=candidates, seed=seed)
                for seed, (users, candidates) in enumerate(_EXAMPLES)
            ]
            feeds.append(random_feed(self._session.get_inputs(), **TYPICAL, seed=len(feeds)))
        self.feeds = feeds
        self.outputs = [self._run(feed) for feed in feeds]
        self.nodes = len(model.graph.node)
        self.flops = count_flops(model, **TYPICAL)
        self.latency_ms = 0.0  # until `_time`

    def difference(self, other: _Proof) -> float:
        """The largest between their outputs; infinite where one has a NaN, or another shape."""
        largest = 0.0
        for mine, theirs in zip(self.outputs, other.outputs, strict=True):
            for one, two in zip(mine, theirs, strict=True):
                if one.shape != two.shape:
                    return float("inf")
                apart = np.abs(one - two).max(initial=0.0)
                largest = max(largest, float(apart) if np.isfinite(apart) else float("inf"))
        return largest

    def run_typical(self) -> None:
        self._run(self.feeds[-1])

    def _run(self, feed: Feed) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self._session.run(None, {name: feed[name] for name in self._inputs})
        return outputs


def _time(proofs: Sequence[_Proof]) -> None:
    """Median latency of each, in turns, so that whatever else the machine does meets all alike."""
    distinct = list(dict.fromkeys(proofs))
    seconds: list[list[float]] = [[] for _ in distinct]
    for _ in range(_TIMED_RUNS):
        for proof, taken in zip(distinct, seconds, strict=True):
            began = time.perf_counter()
            proof.run_typical()
            taken.append(time.perf_counter() - began)
    for proof, taken in zip(distinct, seconds, strict=True):
        proof.latency_ms = float(np.median(taken) * 1e3)


def _try(graph_pass: GraphPass, before: _Proof) -> tuple[str | None, int, _Proof]:
    """Why the pass is left out (None: it is not), how often it rewrote, and the graph to go on with."""
    try:
        model = ir.from_proto(before.model)
        rewrites = graph_pass.apply(model)
        if not rewrites:
            return None, 0, before
        after = _Proof(tidied(model), before.feeds)
    except Exception as error:  # noqa: BLE001 - a pass that fails must not cost the export; the reason is reported
        return f"{type(error).__name__}: {error}", 0, before
    difference = after.difference(before)
    if not difference <= TOLERANCE:
        return f"its graph's scores differ by up to {difference:.2g}, more than {TOLERANCE:g}", 0, before
    return None, rewrites, after


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
