"""What scripts/bench/export.py compares: one model's graphs in ONNX Runtime, and the same module in torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from export.bundle import PassReport
from export.graph import DenseGraph, export_graph
from export.optimize import optimize
from export.passes import PASSES
from scripts.bench.export_models import as_tensors
from scripts.bench.export_precisions import TOLERANCE, make_variants
from scripts.bench.export_sessions import Feed, Scores, Side
from torchrank.features.schema import FeatureSchema
from torchrank.models import RankModel


@dataclass(frozen=True)
class Graphs:
    """The graph as the exporter gives it, ours in each precision, and how ours came about."""

    files: dict[str, Path]  # exporter, fp32, and fp16, int8 where the model can have them
    after: dict[str, Path]  # by the names of the passes that rewrote something, in their order
    reports: list[PassReport]
    refused: dict[str, str]  # pass or precision: why it is left out, or over its gate


def write_graphs(model: RankModel, schema: FeatureSchema, folder: Path) -> Graphs:
    folder.mkdir(parents=True)
    files = {side: folder / f"{side}.onnx" for side in ("exporter", "fp32")}
    graphs = Graphs(files, {}, [], {})
    export_graph(model, schema, files["exporter"])
    proto = onnx.load(files["exporter"])
    for graph_pass in PASSES:
        proto, (report,) = optimize(proto, passes=[graph_pass])
        graphs.reports.append(report)
        if report.left_out:
            graphs.refused[report.name] = report.left_out
        if report.rewrites:
            graphs.after[report.name] = folder / f"after_{report.name}.onnx"
            onnx.save(proto, graphs.after[report.name])
    onnx.save(proto, files["fp32"])
    for precision, (graph, refused) in make_variants(proto, model, schema).items():
        if refused:
            graphs.refused[precision] = refused
        if graph:
            files[precision] = folder / f"{precision}.onnx"
            onnx.save(graph, files[precision])
    return graphs


def in_torch(model: RankModel, schema: FeatureSchema, feed: Feed, *, compiled: bool) -> dict[str, Side | str]:
    """Torch eager, torch.compile and TorchScript of one module, or why one of them cannot be had."""
    module, tensors = DenseGraph(model, schema).eval(), as_tensors(feed, schema)

    def side(call: Callable[..., tuple[torch.Tensor, ...]]) -> Side:
        def run() -> Scores:
            with torch.inference_mode():
                return [scores.numpy() for scores in call(*tensors)]

        return run

    sides: dict[str, Side | str] = {"eager": side(module), "torchscript": side(_scripted(module, tensors))}
    if compiled:
        sides["compile"] = _compiled(side, module)
    return sides


def _scripted(module: DenseGraph, tensors: tuple[torch.Tensor, ...]) -> torch.jit.ScriptModule:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # deprecated
        return torch.jit.freeze(torch.jit.trace(module, tensors))


def _compiled(side: Callable[..., Side], module: DenseGraph) -> Side | str:
    """For the very shapes of the feed, which serves it best; inductor compiles at the first call."""
    run = side(torch.compile(module, dynamic=False))
    try:
        run()
    except Exception as error:  # noqa: BLE001 - no compiler, or one that fails: the table says so
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
    return run


def check(name: str, sides: Mapping[str, Side], expected: Scores) -> dict[str, float]:
    """The largest difference of each side's probabilities from torch's. Ends the benchmark where one is too large."""
    apart: dict[str, float] = {}
    for side, run in sides.items():
        found = max(float(np.abs(mine - theirs).max()) for mine, theirs in zip(run(), expected, strict=True))
        if not found <= (tolerance := TOLERANCE.get(side, TOLERANCE["fp32"])):
            raise SystemExit(f"{name}, {side}: its scores are {found:.2g} from torch's, more than {tolerance:g}")
        apart[side] = found
    return apart
