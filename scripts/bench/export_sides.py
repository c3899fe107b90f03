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
from export.flops import count_flops
from export.fp16 import to_fp16
from export.graph import DenseGraph, export_graph
from export.int8 import matrix_layers, to_int8, worth_quantizing
from export.optimize import optimize
from scripts.bench.export_models import as_tensors
from scripts.bench.export_sessions import Feed, Scores, Side
from torchrank.features.schema import FeatureSchema
from torchrank.models import RankModel

TOLERANCE = {"fp16": 2e-3, "int8": 1e-2}  # of a probability; of every other side:
_FP32_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Graphs:
    """The graph as the exporter gives it, ours in each precision, and how ours came about."""

    files: dict[str, Path]  # exporter, fp32, fp16, int8
    reports: tuple[PassReport, ...]

    def sizes(self, candidates: int) -> dict[tuple[str, str], int]:
        """Nodes and FLOPs before and after the passes: ("nodes" or "flops", "exporter" or "fp32") -> number."""
        found = {}
        for side in ("exporter", "fp32"):
            proto = onnx.load(self.files[side])
            found["nodes", side] = len(proto.graph.node)
            found["flops", side] = count_flops(proto, users=1, candidates=candidates)
        return found


def write_graphs(model: RankModel, schema: FeatureSchema, folder: Path) -> Graphs:
    folder.mkdir(parents=True)
    files = {side: folder / f"{side}.onnx" for side in ("exporter", "fp32", "fp16", "int8")}
    export_graph(model, schema, files["exporter"])
    proto, reports = optimize(onnx.load(files["exporter"]), tell=print)
    onnx.save(proto, files["fp32"])
    onnx.save(to_fp16(proto), files["fp16"])
    layers = [name for name, shape in matrix_layers(proto).items() if worth_quantizing(shape)]
    onnx.save(to_int8(proto, layers), files["int8"])
    return Graphs(files, reports)


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


def torch_scores(model: RankModel, schema: FeatureSchema, feed: Feed) -> Scores:
    with torch.inference_mode():
        return [scores.numpy() for scores in DenseGraph(model, schema).eval()(*as_tensors(feed, schema))]


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
        if not found <= (tolerance := TOLERANCE.get(side, _FP32_TOLERANCE)):
            raise SystemExit(f"{name}, {side}: its scores are {found:.2g} from torch's, more than {tolerance:g}")
        apart[side] = found
    return apart
