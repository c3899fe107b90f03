"""What int8 saves per layer, and what fp16 and int8 make of a whole graph.

    python scripts/bench/export_variants.py [--graph BUNDLE/model.onnx …] [--json]

    layers   x [rows, in] times a constant matrix, plus bias, relu: fp32 against int8, in turn
    graph    an fp32 graph of a bundle, its fp16 and its int8 variant: size, time to make a session, latency, kernels

CPU, one thread, medians, fp32 and the other in turn. docs/adr/0014-variants.md rests on it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, where `export` is a file and not the package

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from export.example_inputs import random_feed
from export.fp16 import to_fp16
from export.int8 import matrix_layers, to_int8, worth_quantizing
from scripts.bench.export_sessions import in_onnx_runtime, medians_ms, open_session

# rows, in, out: experts and towers for 500 candidates, a user's one row, attention over 50 steps of 500 candidates
SHAPES = (
    (500, 400, 4096), (500, 400, 512), (500, 512, 256), (500, 200, 80), (500, 64, 64), (500, 64, 32), (500, 256, 16),
    (500, 400, 8), (500, 256, 1), (1, 400, 4096), (1, 64, 32), (25_000, 64, 80), (25_000, 80, 40), (25_000, 32, 80),
    (25_000, 64, 32), (25_000, 128, 16),
)  # fmt: skip


def layer(width: int, out: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.standard_normal((width, out)).astype(np.float32) / np.sqrt(width),
        "b": rng.standard_normal(out),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "W", "b"], ["h"], name="layer"),
        helper.make_node("Relu", ["h"], ["y"], name="relu"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", out])]
    constants = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def compare(graphs: dict[str, onnx.ModelProto], feed: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Per variant: bytes, ms to make a session, ms a run, and how many of each kernel the optimised graph has."""
    found: dict[str, Any] = {}
    sides = {}
    for name, graph in graphs.items():
        path = folder / f"{name}.onnx"
        onnx.save(graph, path)
        began = time.perf_counter()
        session = open_session(path, 1)
        found[name] = {"bytes": path.stat().st_size, "session_ms": (time.perf_counter() - began) * 1e3}
        found[name]["kernels"] = dict(kernels(path, folder / "optimised.onnx").most_common())
        sides[name] = in_onnx_runtime(session, feed)
    for name, taken in medians_ms(sides, rounds=rounds).items():
        found[name]["ms"] = taken
    return found


def kernels(path: Path, optimised: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(optimised)
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(optimised).graph.node)


def of_layers(folder: Path, rounds: int, console: Console) -> list[dict[str, Any]]:
    table = Table("rows", "in", "out", "fp32 ms", "int8 ms", "times faster", "quantized", title="Layers")
    results = []
    for rows, width, out in SHAPES:
        fp32 = layer(width, out)
        feed = {"x": np.random.default_rng(1).standard_normal((rows, width), np.float32)}
        found = compare({"fp32": fp32, "int8": to_int8(fp32, ["layer"])}, feed, folder, rounds)
        one, two, worth = found["fp32"]["ms"], found["int8"]["ms"], worth_quantizing((width, out))
        results.append({"rows": rows, "in": width, "out": out, "fp32_ms": one, "int8_ms": two, "worth": worth})
        numbers = (str(rows), str(width), str(out), f"{one:.3f}", f"{two:.3f}", f"{one / two:.2f}")
        table.add_row(*numbers, "yes" if worth else "no")
    console.print(table)
    return results


def of_graph(path: Path, folder: Path, rounds: int, console: Console) -> dict[str, Any]:
    fp32 = onnx.load(path)
    layers = [name for name, shape in matrix_layers(fp32).items() if worth_quantizing(shape)]
    graphs = {"fp32": fp32, "fp16": to_fp16(fp32), "int8": to_int8(fp32, layers)}
    feed = random_feed(open_session(path, 1).get_inputs(), users=1, candidates=500, seed=0)
    found = compare(graphs, feed, folder, rounds)
    table = Table("variant", "bytes", "session ms", "ms", "kernels", title=f"{path.name}: 1 user, 500 candidates")
    for name, values in found.items():
        kinds = ", ".join(f"{kind} {count}" for kind, count in values["kernels"].items())
        table.add_row(name, f"{values['bytes']:,}", f"{values['session_ms']:.1f}", f"{values['ms']:.2f}", kinds)
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--graph", type=Path, action="append", default=[], help="model.onnx of a bundle; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", action="store_true", help="one JSON object last")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"layers": of_layers(Path(folder), arguments.rounds, console)}
        result["graphs"] = {
            str(path): of_graph(path, Path(folder), arguments.rounds, console) for path in arguments.graph
        }
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
