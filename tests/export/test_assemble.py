"""ids → look-up → named inputs, against naive loops over random batches of several requests."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.codec import CODECS, decode, encode, page_rows, row_bytes
from embedding_store.lookup import LookupReply, TableRows
from embedding_store.memory import MemoryStore
from embedding_store.release import Codec, ReleaseManifest, TableInfo
from export.assemble import Assembler, InputType
from export.bundle import InvalidBundle
from torchrank.features.batch import FeatureBatch, Ragged, SideBatch
from torchrank.features.schema import EmbeddingGroup, FeatureSchema, build_schema
from torchrank.features.spec import load_feature_spec

SPEC = load_feature_spec(
    {
        "embedding_dim": 6,
        "columns": {
            "user": {"side": "user", "type": "string"},
            "seen": {"side": "user", "type": "list<int64>"},
            "age": {"side": "user", "type": "float32"},
            "item": {"side": "item", "type": "int64"},
            "like": {"side": "item", "type": "list<int64>"},
            "tags": {"side": "item", "type": "list<string>"},
            "price": {"side": "item", "type": "float32"},
        },
        "features": [
            {"name": "user", "op": "id", "inputs": ["user"], "buckets": 40},
            {
                "name": "seen",
                "op": "last_k",
                "inputs": ["seen"],
                "num_embeddings": 50,
                "table": "item",
                "max_length": 5,
            },
            {"name": "age", "op": "raw", "inputs": ["age"]},
            {"name": "item", "op": "id", "inputs": ["item"], "num_embeddings": 50},
            {
                "name": "like",
                "op": "last_k",
                "inputs": ["like"],
                "num_embeddings": 50,
                "table": "item",
                "max_length": 3,
            },
            {"name": "tags", "op": "id", "inputs": ["tags"], "buckets": 30, "pooling": "mean"},
            {"name": "price", "op": "raw", "inputs": ["price"]},
        ],
    }
)
GROUPS = {"deep": EmbeddingGroup(), "wide": EmbeddingGroup(features=("user", "tags", "like"), dim=1)}
U, N = 3, 11


def _inputs(schema: FeatureSchema, floats: InputType = np.float32) -> dict[str, InputType]:
    names = ["user_pooled", "item_pooled", "user_dense", "item_dense", *(s.name for s in schema.sequences)]
    integers = ["user_index", *(f"{s.name}.length" for s in schema.sequences)]
    return dict.fromkeys(names, floats) | dict.fromkeys(integers, np.int64)


def _store(schema: FeatureSchema, codec: Codec, rng: np.random.Generator) -> tuple[MemoryStore, Mapping[str, NDArray]]:
    tables = {t.name: rng.normal(size=(t.rows, t.dim)).astype(np.float32) for t in schema.tables}
    tables = {name: decode(codec, encode(codec, rows)) for name, rows in tables.items()}
    infos = tuple(
        TableInfo(t.name, t.rows, t.dim, codec, row_bytes(codec, t.dim), page_rows(row_bytes(codec, t.dim)), "")
        for t in schema.tables
    )
    store = MemoryStore()
    store.add(ReleaseManifest("m", "1", "", infos), {name: encode(codec, rows) for name, rows in tables.items()})
    return store, tables


def _ragged(rng: np.random.Generator, rows: int, ids: int, most: int, weights: bool = False) -> Ragged:
    offsets = np.concatenate(([0], np.cumsum(rng.integers(0, most + 1, rows)))).astype(np.int64)
    drawn = rng.random(offsets[-1]).astype(np.float32) if weights else None
    return Ragged(rng.integers(0, ids, offsets[-1]), offsets, drawn)


def _batch(rng: np.random.Generator) -> FeatureBatch:
    user = {"user": _ragged(rng, U, 41, 1), "seen": _ragged(rng, U, 51, 8)}
    item = {
        "item": _ragged(rng, N, 51, 1),
        "like": _ragged(rng, N, 51, 3),
        "tags": _ragged(rng, N, 30, 4, weights=True),
    }
    return FeatureBatch(
        SideBatch(U, user, rng.normal(size=(U, 1)).astype(np.float32)),
        SideBatch(N, item, rng.normal(size=(N, 1)).astype(np.float32)),
        np.sort(rng.integers(0, U, N)),
    )


def _rows(table: NDArray, ragged: Ragged, row: int) -> list[NDArray]:
    """Weighted rows of one sample; an id that the table lacks is its default row, zeros."""
    found = []
    for i in range(ragged.offsets[row], ragged.offsets[row + 1]):
        vector = table[ragged.values[i]] if ragged.values[i] < len(table) else np.zeros(table.shape[1])
        found.append(vector.astype(np.float64) * (1 if ragged.weights is None else ragged.weights[i]))
    return found


def _naive(schema: FeatureSchema, batch: FeatureBatch, tables: Mapping[str, NDArray]) -> dict[str, NDArray]:
    sides = {"user": batch.user, "item": batch.item}
    want: dict[str, NDArray] = {"user_index": batch.user_index}
    for side, slots in (("user", schema.user_pooled), ("item", schema.item_pooled)):
        want[f"{side}_dense"] = sides[side].dense
        want[f"{side}_pooled"] = np.zeros((sides[side].rows, sum(s.dim for s in slots)))
        for slot in slots:
            ragged = sides[side].sparse[slot.feature]
            for r in range(sides[side].rows):
                vectors = _rows(tables[slot.table], ragged, r)
                total = np.sum(vectors, axis=0) if vectors else np.zeros(slot.dim)
                divisor = max(len(vectors), 1) if slot.pooling == "mean" else 1
                want[f"{side}_pooled"][r, slot.start : slot.start + slot.dim] = total / divisor
    for sequence in schema.sequences:
        side_batch = sides[sequence.rows]
        out = np.zeros((side_batch.rows, sequence.max_length, sequence.dim))
        for r in range(side_batch.rows):
            for t, vector in enumerate(_rows(tables[sequence.table], side_batch.sparse[sequence.feature], r)):
                if t < sequence.max_length:
                    out[r, t] = vector
        want[sequence.name] = out
        want[f"{sequence.name}.length"] = np.minimum(side_batch.sparse[sequence.feature].lengths, sequence.max_length)
    return want


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("floats", "exact"), [(np.float32, 1e-5), (np.float16, 2.0**-10)])
@pytest.mark.parametrize("seed", range(5))
def test_inputs_equal_a_naive_loop(codec: Codec, floats: InputType, exact: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    schema = build_schema(SPEC, ["click"], GROUPS)
    store, tables = _store(schema, codec, rng)
    assembler = Assembler(schema, store.manifest("m@1").tables, _inputs(schema, floats))
    batch = _batch(rng)
    feed = assembler.inputs(batch, store.lookup("m@1", assembler.ids(batch)))
    want = _naive(schema, batch, tables)
    assert sorted(feed) == sorted(want)
    for name, expected in want.items():
        assert feed[name].dtype == (np.int64 if expected.dtype == np.int64 else floats), name
        np.testing.assert_allclose(feed[name], expected, rtol=exact, atol=exact / 10, err_msg=f"{name}, seed {seed}")


def test_rows_may_be_shared_and_out_of_order() -> None:
    """A store dedupes: `index` says which row each id got."""
    rng = np.random.default_rng(9)
    schema = build_schema(SPEC, ["click"])
    store, _ = _store(schema, "fp32", rng)
    assembler = Assembler(schema, store.manifest("m@1").tables, _inputs(schema))
    batch = _batch(rng)
    plain = store.lookup("m@1", assembler.ids(batch))
    shared = {}
    for name, ids in assembler.ids(batch).items():
        _, first, index = np.unique(ids, return_index=True, return_inverse=True)
        turned = first[::-1]
        rows = plain.tables[name]
        shared[name] = TableRows(rows.rows[turned], rows.status[turned], len(first) - 1 - index)
    got, want = assembler.inputs(batch, LookupReply("m@1", shared)), assembler.inputs(batch, plain)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_each_table_is_asked_once_for_all_its_features() -> None:
    schema = build_schema(SPEC, ["click"], GROUPS)
    store, _ = _store(schema, "fp32", np.random.default_rng(0))
    batch = _batch(np.random.default_rng(1))
    ids = Assembler(schema, store.manifest("m@1").tables, _inputs(schema)).ids(batch)
    seen, item, like = (batch.user.sparse["seen"], batch.item.sparse["item"], batch.item.sparse["like"])
    assert set(ids) == {"user", "item", "tags", "wide.user", "wide.item", "wide.tags"}
    assert sorted(ids["item"]) == sorted(np.concatenate([seen.values, item.values, like.values]))
    np.testing.assert_array_equal(ids["wide.item"], like.values)


def test_what_the_graph_dropped_is_neither_fed_nor_looked_up() -> None:
    schema = build_schema(SPEC, ["click"], GROUPS)
    store, _ = _store(schema, "fp32", np.random.default_rng(0))
    batch = _batch(np.random.default_rng(1))
    assembler = Assembler(schema, store.manifest("m@1").tables, {"item_pooled": np.float32, "seen.length": np.int64})
    ids = assembler.ids(batch)
    assert set(ids) == {"item", "tags", "wide.tags"}
    np.testing.assert_array_equal(ids["item"], batch.item.sparse["item"].values)
    feed = assembler.inputs(batch, store.lookup("m@1", ids))
    assert set(feed) == {"item_pooled", "seen.length"}
    np.testing.assert_array_equal(feed["seen.length"], np.minimum(batch.user.sparse["seen"].lengths, 5))


def test_an_input_that_the_schema_does_not_describe() -> None:
    schema = build_schema(SPEC, ["click"])
    store, _ = _store(schema, "fp32", np.random.default_rng(0))
    with pytest.raises(InvalidBundle, match="does not describe: mystery"):
        Assembler(schema, store.manifest("m@1").tables, {"item_pooled": np.float32, "mystery": np.float32})


def test_a_table_that_the_bundle_lacks() -> None:
    schema = build_schema(SPEC, ["click"])
    store, _ = _store(schema, "fp32", np.random.default_rng(0))
    tables = [table for table in store.manifest("m@1").tables if table.name != "tags"]
    with pytest.raises(InvalidBundle, match="tables that the bundle lacks: tags"):
        Assembler(schema, tables, {"item_pooled": np.float32})


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("item_pooled", np.int64, "'item_pooled' of the graph is int64; accepted: float32 or float16"),
        ("seen.length", np.float32, "'seen.length' of the graph is float32; accepted: int64"),
    ],
)
def test_an_input_of_a_type_that_cannot_be_fed(name: str, found: InputType, message: str) -> None:
    schema = build_schema(SPEC, ["click"])
    store, _ = _store(schema, "fp32", np.random.default_rng(0))
    with pytest.raises(InvalidBundle, match=message):
        Assembler(schema, store.manifest("m@1").tables, {name: found})
