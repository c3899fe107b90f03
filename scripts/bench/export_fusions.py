"""Products side by side in ONNX Runtime: each alone, beside one Gemm and a Split, or one batched MatMul.

    python -m scripts.bench.export_fusions [--repeats 60] [--json]

What `export/passes/horizontal.py` fuses, and what it leaves as it is, was decided by these figures. Ratios above 1 mean
that the fused form is faster; one thread, medians in turns.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from export.example_inputs import in_memory
from scripts.bench.export_sessions import in_onnx_runtime, medians_ms

CANDIDATES = (100, 500, 2000)
# Products, columns of their input, columns of each output.
GEMMS = ((2, 64, 8), (8, 64, 8), (2, 512, 8), (8, 512, 8), (4, 512, 16), (4, 512, 24), (2, 512, 32), (4, 512, 64),
         (3, 64, 400), (8, 512, 128))  # fmt: skip
# Experts, columns of their input, their two layers.
STACKS = ((16, 64, 16, 8), (8, 43, 32, 16), (8, 43, 128, 64), (8, 200, 128, 64), (8, 195, 512, 256))
_READER = 8  # columns of the layer that reads each output

Shape = tuple[int, ...]


class _Graph:
    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._rng = np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"v{len(self._nodes)}_{k}" for k in range(outputs)]
        self._nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def weights(self, *shape: int) -> str:
        return self.constant((0.1 * self._rng.standard_normal(shape)).astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def gemm(self, x: str, columns: int, width: int) -> str:
        return self("Gemm", x, self.weights(columns, width), self.weights(width))[0]

    def model(self, output: str) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", self.columns])
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "graph", [x], [result], self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def gemms(products: int, columns: int, width: int, *, fused: bool) -> onnx.ModelProto:
    g = _Graph(columns)
    if fused:
        (wide,) = g("Relu", g.gemm("x", columns, products * width))
        parts = g("Split", wide, g.constant(np.full(products, width)), outputs=products, axis=1)
    else:
        parts = [g("Relu", g.gemm("x", columns, width))[0] for _ in range(products)]
    return g.model(g("Sum", *(g.gemm(part, width, _READER) for part in parts))[0])


def stack(experts: int, columns: int, hidden: int, width: int, *, fused: bool) -> onnx.ModelProto:
    """[N, experts, width]."""
    g = _Graph(columns)
    if not fused:
        layers = [
            g("Relu", g.gemm(g("Relu", g.gemm("x", columns, hidden))[0], hidden, width))[0] for _ in range(experts)
        ]
        axis = g.constant(np.array([1]))
        return g.model(g("Concat", *(g("Unsqueeze", layer, axis)[0] for layer in layers), axis=1)[0])
    x = "x"
    for inner, outer in ((columns, hidden), (hidden, width)):
        (product,) = g("MatMul", x, g.weights(experts, inner, outer))
        (x,) = g("Relu", g("Add", product, g.weights(experts, 1, outer))[0])
    return g.model(g("Transpose", x, perm=[1, 0, 2])[0])


def ratio(apart: onnx.ModelProto, fused: onnx.ModelProto, columns: int, candidates: int, repeats: int) -> float:
    feed = {"x": np.random.default_rng(1).standard_normal((candidates, columns), np.float32)}
    sides = {name: in_onnx_runtime(in_memory(model), feed) for name, model in (("apart", apart), ("fused", fused))}
    elapsed = medians_ms(sides, rounds=repeats)
    return elapsed["apart"] / elapsed["fused"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", action="store_true", help="one JSON object after the table")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    table = Table("fused", "products", "in", "out", *(f"N {n:,}" for n in CANDIDATES))
    for what, make, shapes in (("Gemm, Split", gemms, GEMMS), ("batched MatMul", stack, STACKS)):
        for products, columns, *widths in shapes:
            found = [
                ratio(make(products, columns, *widths, fused=False), make(products, columns, *widths, fused=True),
                      columns, candidates, options.repeats)
                for candidates in CANDIDATES
            ]  # fmt: skip
            outputs = ", ".join(map(str, widths))
            table.add_row(what, str(products), str(columns), outputs, *(f"{value:.2f}" for value in found))
            name = f"{make.__name__}.{products}x{columns}.{'x'.join(map(str, widths))}"
            figures |= {f"{name}.{n}": round(value, 3) for n, value in zip(CANDIDATES, found, strict=True)}
    table.title = "time apart / time fused, N candidates"
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
