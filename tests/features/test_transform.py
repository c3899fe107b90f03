"""The whole path three ways: Arrow batches, single requests, and a plain loop over rows written from the documents."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from torchrank.features.batch import FeatureBatch, SideBatch
from torchrank.features.spec import load_feature_spec
from torchrank.features.transform import FeatureTransform

WORDS = ["", "a", "ab", "é", "日本語", "🙂🙂", "x" * 31, "y" * 32, "long " * 20, "tail\x00zero"]
INTS = [0, 1, 2, 3, 9, 10, -1, 2**63 - 1, -(2**63), 86400]

COLUMNS = {
    "us": {"side": "user", "type": "string"},
    "ui": {"side": "user", "type": "int64"},
    "uf": {"side": "user", "type": "float32"},
    "us_list": {"side": "user", "type": "list<string>"},
    "ui_list": {"side": "user", "type": "list<int64>"},
    "ci": {"side": "context", "type": "int64"},
    "is": {"side": "item", "type": "string"},
    "ii": {"side": "item", "type": "int64"},
    "if": {"side": "item", "type": "float32"},
    "is_list": {"side": "item", "type": "list<string>"},
    "if_list": {"side": "item", "type": "list<float32>"},
}
BOUNDS = [-1.5, 0, 0.1, 0.7, 3, 1e6]
FEATURES: list[dict[str, Any]] = [
    {"op": "id", "inputs": ["us"], "buckets": 97},
    {"op": "id", "inputs": ["is"], "buckets": 1 << 40, "default": "nothing"},
    {"op": "id", "inputs": ["ii"], "buckets": 11},
    {"op": "id", "inputs": ["ci"], "buckets": 1000, "default": -5},
    {"op": "id", "inputs": ["ui"], "num_embeddings": 10},
    {"op": "id", "inputs": ["ii"], "num_embeddings": 10, "oov": "drop", "default": 3},
    {"op": "id", "inputs": ["is"], "vocabulary": ["é", "ab", "y" * 32, "日本語"], "oov": "drop"},
    {"op": "id", "inputs": ["us"], "vocabulary": ["b", "a"], "default": "a"},
    {"op": "id", "inputs": ["ii"], "vocabulary": [86400, -1, 2**63 - 1], "default": 5},
    {"op": "id", "inputs": ["is_list"], "buckets": 50},
    {"op": "id", "inputs": ["us_list"], "buckets": 50, "default": "none"},
    {"op": "last_k", "inputs": ["us_list"], "buckets": 500, "max_length": 3},
    {"op": "last_k", "inputs": ["us_list"], "vocabulary": ["ab", "a"], "max_length": 2, "oov": "drop", "default": "a"},
    {"op": "last_k", "inputs": ["ui_list"], "num_embeddings": 10, "max_length": 4, "default": 0},
    {"op": "last_k", "inputs": ["is_list"], "buckets": 70, "max_length": 100},
    {"op": "bucketize", "inputs": ["if"], "boundaries": BOUNDS},
    {"op": "bucketize", "inputs": ["uf"], "boundaries": BOUNDS, "default": 0.7},
    {"op": "bucketize", "inputs": ["ii"], "boundaries": BOUNDS},
    {"op": "bucketize", "inputs": ["if_list"], "boundaries": BOUNDS, "default": -3},
    {"op": "bucketize", "inputs": ["ui_list"], "boundaries": BOUNDS},
    {"op": "combo", "inputs": ["us", "ui"], "buckets": 1009},
    {"op": "combo", "inputs": ["ci", "us"], "buckets": 1009},
    {"op": "combo", "inputs": ["us", "is", "ii", "ci"], "buckets": 1 << 50},
    {"op": "combo", "inputs": ["ii", "is"], "buckets": 2},
    {"op": "raw", "inputs": ["uf"], "clip": [-2, 1e6], "log1p": True},
    {"op": "raw", "inputs": ["if"], "default": -7.5, "clip": [-10, 10], "zscore": [2.5, 0.3]},
    {"op": "raw", "inputs": ["ci"], "minmax": [0, 24]},
    {"op": "raw", "inputs": ["ii"], "log1p": True, "zscore": [1, 10]},
]
SPEC = load_feature_spec(
    {"columns": COLUMNS, "features": [{"name": f"{i}_{f['op']}_{f['inputs'][0]}"} | f for i, f in enumerate(FEATURES)]}
)
TRANSFORM = FeatureTransform(SPEC)

floats = st.one_of(
    st.sampled_from([0.1, 0.7, 3.0, -1.5, 1e6, math.nan, 16777217.0]), st.floats(-1e9, 1e9), st.integers(-9, 9)
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": st.none() | st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    "int64": st.none() | st.sampled_from(INTS) | st.integers(-(2**63), 2**63 - 1),
    "float32": st.none() | floats,
}


def value_of(kind: str) -> st.SearchStrategy[Any]:
    if kind.startswith("list<"):
        return st.none() | st.lists(VALUES[kind[5:-1]], max_size=7)
    return VALUES[kind]


def mapping_of(side: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({name: value_of(c["type"]) for name, c in COLUMNS.items() if c["side"] == side})


requests = st.lists(
    st.tuples(mapping_of("user"), mapping_of("context"), st.lists(mapping_of("item"), min_size=1, max_size=5)),
    min_size=1,
    max_size=4,
)


# --- the plain loop ---------------------------------------------------------------------------------------------------


def is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def spark_hash(values: list[Any]) -> int:
    h = 42
    for value in values:
        if not is_missing(value):
            h = xxhash.xxh64_intdigest(value.encode() if isinstance(value, str) else struct.pack("<q", value), h)
    return h - 2**64 if h >= 2**63 else h


def naive_id(f: dict[str, Any], value: Any, kind: str) -> list[int]:
    """The ids of one value: one, or none."""
    if is_missing(value):
        value = f.get("default")
        if value is None:
            return []
    if f["op"] == "bucketize":
        as_column = np.float32 if "float32" in kind else np.float64
        return [sum(1 for boundary in f["boundaries"] if as_column(boundary) <= as_column(value))]
    if "buckets" in f:
        return [spark_hash([value]) % f["buckets"]]
    known = f["vocabulary"] if "vocabulary" in f else range(f["num_embeddings"])
    if value in known:
        return [known.index(value)]
    return [] if f.get("oov") == "drop" else [len(known)]


def naive_ids(f: dict[str, Any], row: dict[str, Any]) -> list[int]:
    if f["op"] == "combo":
        return [spark_hash([row[name] for name in f["inputs"]]) % f["buckets"]]
    (column,) = f["inputs"]
    kind, values = COLUMNS[column]["type"], row[column]
    if not kind.startswith("list<"):
        return naive_id(f, values, kind)
    if values is None:
        return naive_id(f, None, kind)
    if "max_length" in f:
        values = values[-f["max_length"] :]
    return [i for value in values for i in naive_id(f, value, kind)]


def naive_raw(f: dict[str, Any], row: dict[str, Any]) -> float:
    value = row[f["inputs"][0]]
    kind = COLUMNS[f["inputs"][0]]["type"]
    if is_missing(value):
        value = f.get("default", 0.0)
    elif kind == "float32":
        value = float(np.float32(value))
    low, high = f.get("clip", (-math.inf, math.inf))
    value = min(max(float(value), low), high)
    if f.get("log1p"):
        value = math.log1p(value) if value >= 0 else -math.log1p(-value)
    if "zscore" in f:
        value = (value - f["zscore"][0]) / f["zscore"][1]
    if "minmax" in f:
        value = (value - f["minmax"][0]) / (f["minmax"][1] - f["minmax"][0])
    return value


def naive_side(rows: list[dict[str, Any]], on_user: bool) -> tuple[dict[str, list[list[int]]], list[list[float]]]:
    sides = SPEC.sides()
    sparse, dense = {}, []
    for declared, f in zip(SPEC.features, FEATURES, strict=True):
        if (sides[declared.name] in ("user", "context")) != on_user:
            continue
        if f["op"] == "raw":
            dense.append([naive_raw(f, row) for row in rows])
        else:
            sparse[declared.name] = [naive_ids(f, row) for row in rows]
    return sparse, dense


# --- comparisons ------------------------------------------------------------------------------------------------------


def assert_side_is(side: SideBatch, rows: list[dict[str, Any]], on_user: bool) -> None:
    sparse, dense = naive_side(rows, on_user)
    assert side.rows == len(rows)
    assert list(side.sparse) == list(sparse), "features in the order of the spec"
    for name, expected in sparse.items():
        ragged = side.sparse[name]
        assert ragged.values.dtype == ragged.offsets.dtype == np.int64
        assert ragged.offsets[0] == 0
        assert ragged.offsets[-1] == len(ragged.values)
        found = [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets, ragged.offsets[1:], strict=False)]
        assert found == expected, name
    assert side.dense.dtype == np.float32
    assert side.dense.shape == (len(rows), len(dense))
    np.testing.assert_allclose(side.dense.T, np.array(dense).reshape(len(dense), len(rows)), rtol=1e-6, atol=1e-7)


def assert_sides_equal(one: SideBatch, parts: list[SideBatch]) -> None:
    for name, ragged in one.sparse.items():
        np.testing.assert_array_equal(ragged.values, np.concatenate([part.sparse[name].values for part in parts]))
        np.testing.assert_array_equal(ragged.lengths, np.concatenate([part.sparse[name].lengths for part in parts]))
    np.testing.assert_array_equal(one.dense, np.concatenate([part.dense for part in parts]))


ARROW_TYPES = {"string": pa.string(), "int64": pa.int64(), "float32": pa.float32()}
LARGE_TYPES = {"string": pa.large_string(), "int64": pa.int64(), "float32": pa.float64()}


def arrow_type(kind: str, scalars: dict[str, pa.DataType], as_list: Any) -> pa.DataType:
    return as_list(scalars[kind[5:-1]]) if kind.startswith("list<") else scalars[kind]


def record_batch(rows: list[dict[str, Any]], scalars: dict[str, pa.DataType], as_list: Any) -> pa.RecordBatch:
    fields = [pa.field("request", pa.int64())]
    fields += [pa.field(name, arrow_type(column["type"], scalars, as_list)) for name, column in COLUMNS.items()]
    return pa.RecordBatch.from_pylist(rows, schema=pa.schema(fields))


def arrow_forms(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The same rows as Arrow may hand them over."""
    plain = record_batch(rows, ARROW_TYPES, pa.list_)
    junk = record_batch([*rows[::-1], *rows, *rows[:1]], ARROW_TYPES, pa.list_)
    table = pa.Table.from_batches([plain.slice(i, 1) for i in range(len(rows))])
    encoded = {
        name: column.dictionary_encode() if pa.types.is_string(column.type) else column
        for name, column in zip(plain.schema.names, plain.columns, strict=True)
    }
    return {
        "plain": plain,
        "sliced": junk.slice(len(rows), len(rows)),
        "large": record_batch(rows, LARGE_TYPES, pa.large_list),
        "views": record_batch(rows, ARROW_TYPES | {"string": pa.string_view()}, pa.list_),
        "chunked": table,
        "dictionary": pa.RecordBatch.from_pydict(encoded),
    }


def flat_rows(request_list: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return [
        {"request": number} | user | context | item
        for number, (user, context, items) in enumerate(request_list)
        for item in items
    ]


NOTHING = dict.fromkeys(COLUMNS)
EMPTY = {
    name: [] if column["type"].startswith("list<") else "" if column["type"] == "string" else None
    for name, column in COLUMNS.items()
}


def one_side(row: dict[str, Any], side: str) -> dict[str, Any]:
    return {name: row[name] for name, column in COLUMNS.items() if column["side"] == side}


# A property over three implementations: too much work for hypothesis's idea of a quick example.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(requests)
@example([(one_side(NOTHING, "user"), one_side(NOTHING, "context"), [one_side(NOTHING, "item")] * 2)])
@example([(one_side(EMPTY, "user"), one_side(EMPTY, "context"), [one_side(EMPTY, "item")])] * 2)
def test_arrow_requests_and_the_plain_loop_agree(
    request_list: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]],
) -> None:
    rows = flat_rows(request_list)
    served = [TRANSFORM.from_request(*request) for request in request_list]
    for batch, (user, context, items) in zip(served, request_list, strict=True):
        assert_side_is(batch.user, [user | context], on_user=True)
        assert_side_is(batch.item, [user | context | item for item in items], on_user=False)
        assert batch.user_index.tolist() == [0] * len(items)
    for form, arrow in arrow_forms(rows).items():
        grouped = TRANSFORM.from_arrow(arrow, request_column="request")
        assert grouped.user_index.tolist() == [row["request"] for row in rows], form
        assert_sides_equal(grouped.user, [batch.user for batch in served])
        assert_sides_equal(grouped.item, [batch.item for batch in served])
        single = TRANSFORM.from_arrow(arrow)
        assert single.user_index.tolist() == list(range(len(rows)))
        assert_side_is(single.user, rows, on_user=True)
        assert_sides_equal(single.item, [grouped.item])


@pytest.mark.parametrize("seed", range(3))
def test_a_large_batch_equals_the_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng) for _ in range(700)]
    print(f"seed {seed}")
    for form in arrow_forms(rows).values():
        batch = TRANSFORM.from_arrow(form)
        assert_side_is(batch.user, rows, on_user=True)
        assert_side_is(batch.item, rows, on_user=False)


def random_row(rng: np.random.Generator) -> dict[str, Any]:
    def scalar(kind: str) -> Any:
        if rng.random() < 0.1:
            return None
        if kind == "string":
            return WORDS[rng.integers(len(WORDS))] + (str(rng.integers(10**6)) if rng.random() < 0.5 else "")
        if kind == "int64":
            return INTS[rng.integers(len(INTS))]
        return float(rng.choice([0.1, 0.7, math.nan, rng.normal(0, 100)]))

    row: dict[str, Any] = {"request": 0}
    for name, column in COLUMNS.items():
        kind = column["type"]
        if not kind.startswith("list<"):
            row[name] = scalar(kind)
        elif rng.random() < 0.1:
            row[name] = None
        else:
            row[name] = [
                scalar(kind[5:-1]) for _ in range(rng.integers(0, 130) if rng.random() < 0.1 else rng.integers(6))
            ]
    return row


def test_a_request_without_candidates_has_user_features_and_no_item_rows() -> None:
    row = random_row(np.random.default_rng(9))
    batch = TRANSFORM.from_request(one_side(row, "user"), one_side(row, "context"), [])
    assert_side_is(batch.user, [row], on_user=True)
    assert_side_is(batch.item, [], on_user=False)
    assert batch.user_index.tolist() == []


@pytest.mark.parametrize("request_column", [None, "request"])
def test_an_empty_batch(request_column: str | None) -> None:
    batch = TRANSFORM.from_arrow(record_batch([], ARROW_TYPES, pa.list_), request_column=request_column)
    assert_side_is(batch.user, [], on_user=True)
    assert_side_is(batch.item, [], on_user=False)
    assert batch.user_index.tolist() == []


def small(types: dict[str, str], *features: dict[str, Any]) -> FeatureTransform:
    columns = {name: {"side": "item" if name.startswith("i") else "user", "type": kind} for name, kind in types.items()}
    return FeatureTransform(load_feature_spec({"columns": columns, "features": list(features)}))


def ids_of(batch: FeatureBatch, name: str) -> NDArray[np.int64]:
    side = batch.user if name in batch.user.sparse else batch.item
    return side.sparse[name].values


def test_a_request_is_a_run_of_equal_values_and_its_first_row_speaks_for_the_user() -> None:
    transform = small(
        {"u": "int64", "i": "int64"},
        {"name": "u", "op": "id", "inputs": ["u"], "num_embeddings": 100},
        {"name": "i", "op": "id", "inputs": ["i"], "num_embeddings": 100},
    )
    batch = pa.RecordBatch.from_pydict(
        {"r": ["a", "a", "b", "a", "a", "a"], "u": [1, 2, 3, 4, 5, 6], "i": [7, 8, 9, 10, 11, 12]}
    )
    for column in (batch["r"], batch["r"].dictionary_encode()):
        made = transform.from_arrow(batch.set_column(0, "r", column), request_column="r")
        assert made.user_index.tolist() == [0, 0, 1, 2, 2, 2]
        assert ids_of(made, "u").tolist() == [1, 3, 4]
        assert ids_of(made, "i").tolist() == [7, 8, 9, 10, 11, 12]


def test_id_and_combo_of_one_column_agree_with_sparks_xxhash64() -> None:
    """Signed hashes from test_hashing.py: of 'a' with seed 42, negative, and of 'item_42', positive."""
    transform = small({"i": "string"}, {"name": "x", "op": "id", "inputs": ["i"], "buckets": 1000})
    made = transform.from_request({}, {}, [{"i": "a"}, {"i": "item_42"}])
    assert ids_of(made, "x").tolist() == [-8582455328737087284 % 1000, 8627400147322711903 % 1000]


def test_infinity_is_clipped_where_there_is_a_clip() -> None:
    transform = small({"i": "float32"}, {"name": "x", "op": "raw", "inputs": ["i"], "clip": [-2, 3]})
    made = transform.from_request({}, {}, [{"i": math.inf}, {"i": -math.inf}, {"i": 1e300}, {"i": 10**400 // 10**100}])
    assert made.item.dense.ravel().tolist() == [3, -2, 3, 3]


def test_keys_that_no_feature_reads_are_ignored() -> None:
    transform = small({"i": "int64"}, {"name": "x", "op": "id", "inputs": ["i"], "num_embeddings": 5})
    made = transform.from_request({"age": object()}, {"z": 1}, [{"i": 2, "other": [1]}, {"i": True, "more": {}}])
    assert ids_of(made, "x").tolist() == [2, 1]
