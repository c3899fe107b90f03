"""Random dense graphs for the tests of graph passes: rows of users and of candidates that meet, in any order of ops."""

from __future__ import annotations

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


class _RandomGraph:
    """Grows a pool of values, [N, width] and [N, HISTORY, width], by random operations on random values of it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.b = rng, GraphBuilder()
        self.rows: list[tuple[str, int]] = [(self.b.taken("user_pooled"), USER), ("item_pooled", ITEM)]
        self.keys: list[tuple[str, int]] = [(self.b.taken("history"), DIM)]

    def weights(self, *shape: int) -> str:
        return self.b.constant(self.rng.standard_normal(shape) / np.sqrt(shape[0]))

    def row(self) -> tuple[str, int]:
        return self.rows[self.rng.integers(len(self.rows))]

    def key(self) -> tuple[str, int]:
        return self.keys[self.rng.integers(len(self.keys))]

    def chosen(self, *names: str) -> str:
        return str(self.rng.choice(names))

    def concat(self) -> None:
        (x, width), (y, other) = self.row(), self.row()
        self.rows.append((self.b("Concat", x, y, axis=int(self.rng.choice([1, -1]))), width + other))

    def elementwise(self) -> None:
        (x, width), (y, other) = self.row(), self.row()
        if width == other:
            self.rows.append((self.b(self.chosen("Add", "Mul", "Sub"), x, y), width))
        else:
            self.rows.append((self.b(self.chosen("Relu", "Tanh", "Sigmoid", "Abs", "Neg"), x), width))

    def affine(self) -> None:
        x, width = self.row()
        self.rows.append((self.b("Add", self.weights(width), self.b("Mul", x, self.weights(width))), width))

    def layer(self) -> None:
        x, width = self.row()
        out = int(self.rng.choice([4, 12, 48]))
        self.rows.append((self.b("Relu", self.b("Gemm", x, self.weights(width, out), self.weights(out))), out))

    def gate(self) -> None:
        x, width = self.row()
        self.rows.append((self.b("Softmax", self.b("Gemm", x, self.weights(8, width), transB=1), axis=-1), 8))

    def normalised(self) -> None:
        x, width = self.row()
        if self.rng.random() < 0.5:
            self.rows.append((self.b("LayerNormalization", x, self.weights(width), self.weights(width)), width))
        else:
            spread = [self.b.constant(self.rng.uniform(0.5, 2, width)) for _ in range(2)]
            parts = (spread[0], self.weights(width), self.weights(width), spread[1])
            self.rows.append((self.b("BatchNormalization", x, *parts), width))

    def columns(self) -> None:
        x, width = self.row()
        half = width // 2
        self.rows.append(
            (self.b("Slice", x, self.b.constant([0]), self.b.constant([half]), self.b.constant([1])), half)
        )

    def pooled(self) -> None:
        keys, width = self.key()
        op = self.chosen("ReduceMean", "ReduceSum", "ReduceMax")
        self.rows.append((self.b(op, keys, self.b.constant([1]), keepdims=0), width))

    def flat(self) -> None:
        keys, width = self.key()
        shape = self.b.constant([-1, HISTORY * width])
        flat = self.b("Flatten", keys) if self.rng.random() < 0.5 else self.b("Reshape", keys, shape)
        self.rows.append((flat, HISTORY * width))

    def weighted(self) -> None:
        """Keys summed by a softmax over them."""
        keys, width = self.key()
        axis = self.b.constant([1])
        scores = self.b("Softmax", self.b("ReduceSum", keys, self.b.constant([2]), keepdims=0), axis=1)
        self.rows.append((self.b("Squeeze", self.b("MatMul", self.b("Unsqueeze", scores, axis), keys), axis), width))

    def query(self, width: int) -> str:
        """[N, 1, width]."""
        x, columns = self.row()
        return self.b("Unsqueeze", self.b("MatMul", x, self.weights(columns, width)), self.b.constant([1]))

    def pairs(self) -> None:
        keys, width = self.key()
        op = self.chosen("Mul", "Add", "Sub")
        self.keys.append((self.b(op, self.query(width), keys), width))

    def attention(self) -> None:
        """The first layer of target attention, as the exporter writes it or with broadcasts and in another order."""
        keys, width = self.key()
        query = self.query(width)
        if self.rng.random() < 0.5:
            shape = self.b("Concat", self.b("Shape", "user_index"), self.b.constant([HISTORY, width]), axis=0)
            query = self.b("Expand", query, shape)
            parts = [query, keys, self.b("Sub", query, keys), self.b("Mul", query, keys)]
        else:
            parts = [keys, self.b("Sub", keys, query), self.b("Mul", query, keys)]
        x = self.b("MatMul", self.b("Concat", *parts, axis=-1), self.weights(len(parts) * width, 10))
        if self.rng.random() < 0.7:
            x = self.b("Add", *self.rng.permutation([x, self.weights(10)]).tolist())
        self.keys.append((self.b(self.chosen("Relu", "Tanh", "Sigmoid"), x), 10))

    def grow(self) -> None:
        (
            self.concat, self.elementwise, self.affine, self.layer, self.gate, self.normalised, self.columns,
            self.pooled, self.flat, self.weighted, self.pairs, self.attention,
        )[self.rng.integers(12)]()  # fmt: skip

    def scores(self) -> list[str]:
        places = {*self.rng.permutation(len(self.rows))[:4].tolist(), len(self.rows) - 2, len(self.rows) - 1}
        found = [
            self.b("Sigmoid", self.b("Gemm", x, self.weights(width, 1), self.weights(1)))
            for x, width in (self.rows[place] for place in sorted(places))
        ]
        axes = self.b.constant([1, 2])
        return found + [self.b("Sigmoid", self.b("ReduceMean", keys, axes, keepdims=0)) for keys, _ in self.keys[-2:]]


def random_graph(rng: np.random.Generator) -> onnx.ModelProto:
    graph = _RandomGraph(rng)
    for _ in range(rng.integers(5, 16)):
        graph.grow()
    return graph.b.model(*graph.scores())


def random_inputs(rng: np.random.Generator, users: int, candidates: int) -> dict[str, NDArray[np.generic]]:
    return {
        "user_pooled": rng.standard_normal((users, USER)).astype(np.float32),
        "item_pooled": rng.standard_normal((candidates, ITEM)).astype(np.float32),
        "history": rng.standard_normal((users, HISTORY, DIM)).astype(np.float32),
        "user_index": np.sort(rng.integers(0, users, candidates)),
    }
