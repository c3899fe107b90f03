"""Random dense graphs for the tests of graph passes: rows of users and of candidates that meet, in any order of ops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

USER, ITEM, HISTORY, DIM = 40, 24, 6, 8  # columns, columns, keys, columns of a key


class GraphBuilder:
    """Nodes by name of op; `model` gives the graph with the inputs of a bundle's."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        return self.many(op, *inputs, outputs=outputs, **attributes)[0]

    def many(self, op: str, *inputs: str, outputs: int, **attributes: object) -> list[str]:
        names = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n{len(self.nodes)}", **attributes))
        return names

    def constant(self, array: NDArray[np.generic] | float | list[int]) -> str:
        name = f"c{len(self.constants)}"
        found = np.asarray(array)
        found = found.astype(np.int64 if found.dtype.kind == "i" else np.float32)
        self.constants.append(numpy_helper.from_array(found, name))
        return name

    def taken(self, value: str) -> str:
        """A user's rows, one per candidate."""
        return self("Gather", value, "user_index", axis=0)

    def model(self, *outputs: str) -> onnx.ModelProto:
        """Outputs are of any shape: float."""
        inputs = [
            helper.make_tensor_value_info("user_pooled", TensorProto.FLOAT, ["U", USER]),
            helper.make_tensor_value_info("item_pooled", TensorProto.FLOAT, ["N", ITEM]),
            helper.make_tensor_value_info("history", TensorProto.FLOAT, ["U", HISTORY, DIM]),
            helper.make_tensor_value_info("user_index", TensorProto.INT64, ["N"]),
        ]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "random", inputs, results, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def random_graph(rng: np.random.Generator) -> onnx.ModelProto:
    """Two to four towers over random mixtures of user and item columns, with shared and equal parts."""
    b = GraphBuilder()

    def weights(*shape: int) -> str:
        return b.constant(rng.standard_normal(shape) / np.sqrt(shape[0]))

    user, item = b.taken("user_pooled"), "item_pooled"
    blocks: list[tuple[str, int]] = [(user, USER), (item, ITEM)]
    keys = b.taken("history")
    blocks.append((b("ReduceMean", keys, b.constant([1]), keepdims=0), DIM))
    unary: list[Callable[[str], str]] = [lambda x, op=op: b(op, x) for op in ("Relu", "Tanh", "Sigmoid", "Abs", "Neg")]
    for _ in range(rng.integers(1, 5)):
        value, width = blocks[rng.integers(len(blocks))]
        kind = rng.integers(5)
        if kind == 0:
            blocks.append((unary[rng.integers(len(unary))](value), width))
        elif kind == 1:
            blocks.append((b("Add", b("Mul", value, weights(width)), weights(width)), width))
        elif kind == 2:
            blocks.append((b("Softmax", value, axis=-1), width))
        elif kind == 3:
            blocks.append((b("Relu", b("MatMul", value, weights(width, 20))), 20))
        else:
            half = width // 2
            ends = (b.constant([0]), b.constant([half]), b.constant([1]))
            blocks.append((b("Slice", value, *ends), half))
    scores = []
    for _ in range(rng.integers(2, 5)):
        chosen = [blocks[k] for k in rng.permutation(len(blocks))[: rng.integers(2, len(blocks) + 1)]]
        x, width = b("Concat", *(value for value, _ in chosen), axis=1), sum(width for _, width in chosen)
        hidden = int(rng.choice([4, 12, 48]))
        pre = b("Gemm", x, weights(width, hidden), weights(hidden))
        h = b("Relu", b("BatchNormalization", pre, *_statistics(b, rng, hidden)) if rng.random() < 0.3 else pre)
        square = b("ReduceSum", b("Mul", x, x), b.constant([1]), keepdims=1)
        out = b("MatMul", h, weights(hidden, 1))
        scores.append(b("Sigmoid", b("Add", out, b("Mul", square, b.constant(0.01)))))
    return b.model(*scores)


def _statistics(b: GraphBuilder, rng: np.random.Generator, width: int) -> list[str]:
    """scale, shift, mean, variance."""
    return [
        b.constant(values)
        for values in (
            rng.uniform(0.5, 2, width),
            rng.standard_normal(width),
            rng.standard_normal(width),
            rng.uniform(0.5, 2, width),
        )
    ]


def random_inputs(rng: np.random.Generator, users: int, candidates: int) -> dict[str, NDArray[np.generic]]:
    return {
        "user_pooled": rng.standard_normal((users, USER)).astype(np.float32),
        "item_pooled": rng.standard_normal((candidates, ITEM)).astype(np.float32),
        "history": rng.standard_normal((users, HISTORY, DIM)).astype(np.float32),
        "user_index": np.sort(rng.integers(0, users, candidates)),
    }
