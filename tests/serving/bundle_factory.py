"""A small bundle that nobody trained: random weights in a real ONNX graph, random tables in real pages.

`TinyModel.expected` scores a raw request in float64 with plain Python loops and the xxhash library; it shares no
code with what it is held against.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import xxhash
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedding_store.codec import encode, page_rows, row_bytes
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.release import Codec, TableInfo
from export.bundle import Golden, Manifest, Variant, write_manifest
from torchrank.features.schema import FeatureSchema, build_schema
from torchrank.features.spec import load_feature_spec

DIM, HIDDEN, LAST = 8, 16, 20
TASKS = ("click", "finish")
HOUR_ROWS, ITEM_ROWS, USER_ROWS, AUTHOR_ROWS, CROSS_ROWS = 24, 1000, 512, 300, 2048
CATEGORIES = ("music", "news", "sport")
AGE_BOUNDARIES = (18.0, 25.0, 35.0, 50.0)

SPEC: dict[str, Any] = {
    "embedding_dim": DIM,
    "columns": {
        "user_id": {"side": "user", "type": "string"},
        "age": {"side": "user", "type": "float32"},
        "recent_items": {"side": "user", "type": "list<int64>"},
        "recent_categories": {"side": "user", "type": "list<string>"},
        "hour": {"side": "context", "type": "int64"},
        "item_id": {"side": "item", "type": "int64"},
        "category": {"side": "item", "type": "string"},
        "tags": {"side": "item", "type": "list<string>"},
        "author": {"side": "item", "type": "string"},
        "price": {"side": "item", "type": "float32"},
        "duration": {"side": "item", "type": "float32"},
    },
    "features": [
        {"name": "user_id", "op": "id", "inputs": ["user_id"], "buckets": USER_ROWS},
        {"name": "age", "op": "bucketize", "inputs": ["age"], "boundaries": list(AGE_BOUNDARIES)},
        {"name": "recent_items", "op": "last_k", "inputs": ["recent_items"], "num_embeddings": ITEM_ROWS,
         "table": "item_id", "max_length": LAST},
        {"name": "recent_categories", "op": "last_k", "inputs": ["recent_categories"], "vocabulary": list(CATEGORIES),
         "table": "category", "max_length": LAST},
        {"name": "hour", "op": "id", "inputs": ["hour"], "num_embeddings": HOUR_ROWS, "oov": "drop"},
        {"name": "item_id", "op": "id", "inputs": ["item_id"], "num_embeddings": ITEM_ROWS},
        {"name": "category", "op": "id", "inputs": ["category"], "vocabulary": list(CATEGORIES)},
        {"name": "tags", "op": "id", "inputs": ["tags"], "buckets": AUTHOR_ROWS, "pooling": "mean"},
        {"name": "author", "op": "id", "inputs": ["author"], "buckets": AUTHOR_ROWS},
        {"name": "user_category", "op": "combo", "inputs": ["user_id", "category"], "buckets": CROSS_ROWS},
        {"name": "price", "op": "raw", "inputs": ["price"], "log1p": True, "zscore": [1.5, 0.5]},
        {"name": "duration", "op": "raw", "inputs": ["duration"], "default": 30.0, "minmax": [0.0, 600.0]},
    ],
}  # fmt: skip

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class TinyModel:
    """`tables`: float32 [rows, dim]; `weights`: `hidden` [inputs, H], `out` [H, tasks], `bias` [tasks]."""

    folder: Path
    manifest: Manifest
    tables: Arrays
    weights: Arrays

    def expected(
        self, user: Mapping[str, Any], context: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[float]]:
        scores: dict[str, list[float]] = {task: [] for task in TASKS}
        for item in candidates:
            x = np.concatenate([self._user_part(user, context), self._item_part(user, item)])
            hidden = np.maximum(x @ self.weights["hidden"].astype(np.float64), 0)
            logits = hidden @ self.weights["out"].astype(np.float64) + self.weights["bias"]
            for task, logit in zip(TASKS, logits, strict=True):
                scores[task].append(float(1 / (1 + np.exp(-logit))))
        return scores

    def _user_part(self, user: Mapping[str, Any], context: Mapping[str, Any]) -> NDArray[np.float64]:
        age = [] if user.get("age") is None else [sum(b <= user["age"] for b in AGE_BOUNDARIES)]
        hour = [h for h in _values(context.get("hour")) if 0 <= h < HOUR_ROWS]
        items = [_in_range(v, ITEM_ROWS) for v in _values(user.get("recent_items"))][-LAST:]
        categories = [_position(v) for v in _values(user.get("recent_categories"))][-LAST:]
        user_ids = [_hash(v) % USER_ROWS for v in _values(user.get("user_id"))]
        return np.concatenate([
            self._pool("user_id", user_ids), self._pool("age", age), self._pool("hour", hour),
            self._pool("item_id", items, mean=True), self._pool("category", categories, mean=True),
        ])  # fmt: skip

    def _item_part(self, user: Mapping[str, Any], item: Mapping[str, Any]) -> NDArray[np.float64]:
        crossed = _hash(*_values(user.get("user_id")), *_values(item.get("category"))) % CROSS_ROWS
        price = item.get("price") or 0.0
        duration = 30.0 if item.get("duration") is None else item["duration"]
        return np.concatenate([
            self._pool("item_id", [_in_range(v, ITEM_ROWS) for v in _values(item.get("item_id"))]),
            self._pool("category", [_position(v) for v in _values(item.get("category"))]),
            self._pool("tags", [_hash(v) % AUTHOR_ROWS for v in _values(item.get("tags"))], mean=True),
            self._pool("author", [_hash(v) % AUTHOR_ROWS for v in _values(item.get("author"))]),
            self._pool("user_category", [crossed]),
            [(np.sign(price) * np.log1p(abs(price)) - 1.5) / 0.5, duration / 600.0],
        ])  # fmt: skip

    def _pool(self, table: str, ids: Iterable[int], *, mean: bool = False) -> NDArray[np.float64]:
        rows = [self.tables[table][i].astype(np.float64) for i in ids]
        total = np.sum(rows, axis=0) if rows else np.zeros(DIM)
        return total / max(len(rows), 1) if mean else total


def _values(raw: Any) -> list[Any]:
    values = raw if isinstance(raw, list) else [raw]
    return [value for value in values if value is not None and value != ""]


def _in_range(value: int, rows: int) -> int:
    return value if 0 <= value < rows else rows  # the last row, shared by all unknown ids


def _position(value: str) -> int:
    return CATEGORIES.index(value) if value in CATEGORIES else len(CATEGORIES)


def _hash(*values: str) -> int:
    """Spark's xxhash64: signed, chained through the seed."""
    seed = 42
    for value in values:
        seed = xxhash.xxh64_intdigest(value.encode(), seed=seed)
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def build_bundle(
    folder: Path, *, seed: int = 1, version: str = "1", codec: Codec = "fp32", golden: int = 1
) -> TinyModel:
    """Writes a complete bundle of the model `tiny` into `folder`, which must not exist."""
    rng = np.random.default_rng(seed)
    spec = load_feature_spec(SPEC)
    schema = build_schema(spec, TASKS)
    (folder / "tables").mkdir(parents=True)
    tables: Arrays = {t.name: rng.normal(0, 0.3, (t.rows, t.dim)).astype(np.float32) for t in schema.tables}
    if codec == "fp16":
        tables = {name: rows.astype(np.float16).astype(np.float32) for name, rows in tables.items()}
    weights = _weights(schema, rng)
    manifest = Manifest(
        torchrank_version="0", model="tiny", version=version, created="2024-05-01T12:00:00Z", opset=18,
        features=spec, schema=schema, passes=(), golden_rows=golden, config_sha256="", data_sha256="",
        tables=tuple(_write_table(folder, name, rows, codec) for name, rows in tables.items()),
        variants=(
            _write_variant(folder, "fp32", _graph(schema, weights, np.float32)),
            _write_variant(folder, "fp16", _graph(schema, weights, np.float16)),
        ),
    )  # fmt: skip
    write_manifest(folder, manifest)
    model = TinyModel(folder, manifest, tables, weights)
    _write_golden(model, golden, rng)
    return model


def publish_bundle(model: TinyModel, store: str) -> None:
    with open_backend(store) as backend:
        publish(model.folder, backend)


def random_request(rng: np.random.Generator, candidates: int) -> dict[str, Any]:
    """A body of POST /rank with missing, unknown and out-of-range values among the ordinary ones."""
    categories = [*CATEGORIES, "opera", None]
    user = {
        "user_id": f"u{rng.integers(10_000)}",
        "age": float(rng.integers(10, 80)),
        "recent_items": rng.integers(-5, ITEM_ROWS + 50, rng.integers(0, 30)).tolist(),
        "recent_categories": [str(c) for c in rng.choice(CATEGORIES, rng.integers(0, 30))],
    }
    return {
        "user": user,
        "context": {"hour": int(rng.integers(-1, HOUR_ROWS + 2))},
        "candidates": [_random_item(rng, categories) for _ in range(candidates)],
    }


def blank_request(*candidates: Mapping[str, Any]) -> dict[str, Any]:
    """A request without any value but those of `candidates`; every column has to be there all the same."""
    blank: dict[str, dict[str, Any]] = {"user": {}, "context": {}, "item": {}}
    for name, column in SPEC["columns"].items():
        blank[column["side"]][name] = None
    items = [blank["item"] | dict(candidate) for candidate in candidates]
    return {"user": blank["user"], "context": blank["context"], "candidates": items}


def _random_item(rng: np.random.Generator, categories: Sequence[str | None]) -> dict[str, Any]:
    item = {
        "item_id": int(rng.integers(-2, ITEM_ROWS + 20)),
        "category": categories[rng.integers(len(categories))],
        "tags": [f"tag {t}" for t in rng.integers(0, 500, rng.integers(0, 4))],
        "author": f"author {rng.integers(2000)}",
        "price": float(np.float32(rng.gamma(2, 5))),
        "duration": float(rng.integers(5, 900)),
    }
    missing = rng.integers(12)  # about every second candidate lacks one value
    return {name: None if i == missing else value for i, (name, value) in enumerate(item.items())}


def _weights(schema: FeatureSchema, rng: np.random.Generator) -> Arrays:
    width = sum(s.dim for s in (*schema.user_pooled, *schema.item_pooled, *schema.sequences))
    width += len(schema.user_dense) + len(schema.item_dense)
    return {
        "hidden": rng.normal(0, 0.4, (width, HIDDEN)).astype(np.float32),
        "out": rng.normal(0, 0.5, (HIDDEN, len(TASKS))).astype(np.float32),
        "bias": rng.normal(0, 0.5, len(TASKS)).astype(np.float32),
    }


def _graph(schema: FeatureSchema, weights: Arrays, precision: type[np.floating[Any]]) -> onnx.ModelProto:
    """relu([user_pooled, mean of each sequence, item_pooled, item_dense] W) out + bias, one sigmoid per task.

    The dense layers compute in `precision`; inputs and outputs are float32.
    """
    compute = helper.np_dtype_to_tensor_dtype(np.dtype(precision))
    nodes, inputs, means = [], [], []
    for sequence in schema.sequences:
        name = sequence.name
        inputs.append(_floats(name, ["U", sequence.max_length, sequence.dim]))
        inputs.append(helper.make_tensor_value_info(f"{name}.length", TensorProto.INT64, ["U"]))
        nodes += [
            helper.make_node("ReduceSum", [name, "time"], [f"{name}.sum"], keepdims=0),
            helper.make_node("Cast", [f"{name}.length"], [f"{name}.count"], to=TensorProto.FLOAT),
            helper.make_node("Max", [f"{name}.count", "one"], [f"{name}.divisor"]),
            helper.make_node("Unsqueeze", [f"{name}.divisor", "time"], [f"{name}.column"]),
            helper.make_node("Div", [f"{name}.sum", f"{name}.column"], [f"{name}.mean"]),
        ]
        means.append(f"{name}.mean")
    nodes += [
        helper.make_node("Concat", ["user_pooled", *means], ["user"], axis=1),
        helper.make_node("Gather", ["user", "user_index"], ["user_rows"], axis=0),
        helper.make_node("Concat", ["user_rows", "item_pooled", "item_dense"], ["floats"], axis=1),
        helper.make_node("Cast", ["floats"], ["x"], to=compute),
        helper.make_node("MatMul", ["x", "hidden"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "out"], ["o"]),
        helper.make_node("Add", ["o", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["sigmoid"]),
        helper.make_node("Cast", ["sigmoid"], ["probabilities"], to=TensorProto.FLOAT),
    ]
    for i, task in enumerate(TASKS):
        nodes.append(helper.make_node("Gather", ["probabilities", f"task{i}"], [task], axis=1))
    inputs += [
        _floats("user_pooled", ["U", sum(s.dim for s in schema.user_pooled)]),
        _floats("item_pooled", ["N", sum(s.dim for s in schema.item_pooled)]),
        _floats("item_dense", ["N", len(schema.item_dense)]),
        helper.make_tensor_value_info("user_index", TensorProto.INT64, ["N"]),
    ]
    constants = [numpy_helper.from_array(value.astype(precision), name) for name, value in weights.items()]
    constants += [numpy_helper.from_array(np.array([1], np.int64), "time")]
    constants += [numpy_helper.from_array(np.array([1], np.float32), "one")]
    constants += [numpy_helper.from_array(np.array(i, np.int64), f"task{i}") for i in range(len(TASKS))]
    graph = helper.make_graph(nodes, "tiny", inputs, [_floats(task, ["N"]) for task in TASKS], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _floats(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _write_table(folder: Path, name: str, rows: NDArray[np.float32], codec: Codec) -> TableInfo:
    content = encode(codec, rows).tobytes()
    hot = np.arange(min(len(rows), 100), dtype="<i8")
    (folder / "tables" / f"{name}.pages").write_bytes(content)
    (folder / "tables" / f"{name}.hot").write_bytes(hot.tobytes())
    size = row_bytes(codec, rows.shape[1])
    return TableInfo(
        name=name, rows=len(rows), dim=rows.shape[1], codec=codec, row_bytes=size, page_rows=page_rows(size),
        sha256=hashlib.sha256(content).hexdigest(), hot_ids=len(hot),
    )  # fmt: skip


def _write_variant(folder: Path, name: str, graph: onnx.ModelProto) -> Variant:
    file = "model.onnx" if name == "fp32" else f"model.{name}.onnx"
    content = graph.SerializeToString()
    (folder / file).write_bytes(content)
    return Variant(name, file, hashlib.sha256(content).hexdigest(), len(content), 0.0, 2e-3)


def _write_golden(model: TinyModel, rows: int, rng: np.random.Generator) -> None:
    with (model.folder / "golden.jsonl").open("wb") as file:
        for _ in range(rows):
            request = random_request(rng, 2)
            file.write(msgspec.json.encode(Golden(**request, scores=model.expected(**request))) + b"\n")
