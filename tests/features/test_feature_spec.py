"""Declarations: what they mean, and what a wrong one is told."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from torchrank.features.errors import FeatureError
from torchrank.features.spec import Bucketize, Combo, FeatureSpec, Id, LastK, Raw, load_feature_spec
from torchrank.features.transform import FeatureTransform

COLUMNS = {
    "user_id": {"side": "user", "type": "string"},
    "age": {"side": "user", "type": "int64"},
    "history": {"side": "user", "type": "list<string>"},
    "hour": {"side": "context", "type": "int64"},
    "item_id": {"side": "item", "type": "string"},
    "price": {"side": "item", "type": "float32"},
    "scores": {"side": "item", "type": "list<float32>"},
}


def declare(*features: dict[str, Any], **more: Any) -> FeatureSpec:
    return load_feature_spec({"columns": COLUMNS, "features": list(features)} | more)


def feature(op: str, *inputs: str, **more: Any) -> dict[str, Any]:
    return {"name": "x", "op": op, "inputs": list(inputs)} | more


def test_a_full_declaration_becomes_structs() -> None:
    spec = declare(
        {"name": "user", "op": "id", "inputs": ["user_id"], "buckets": 10, "default": "nobody"},
        {"name": "recent", "op": "last_k", "inputs": ["history"], "buckets": 99, "max_length": 5, "table": "item"},
        {"name": "item", "op": "id", "inputs": ["item_id"], "buckets": 99, "pooling": "mean"},
        {"name": "age", "op": "bucketize", "inputs": ["age"], "boundaries": [18, 30.5]},
        {"name": "cross", "op": "combo", "inputs": ["user_id", "item_id"], "buckets": 7, "dim": 4},
        {"name": "price", "op": "raw", "inputs": ["price"], "clip": [0, 100], "log1p": True},
        embedding_dim=8,
    )
    assert spec.features == (
        Id(name="user", inputs=("user_id",), buckets=10, default="nobody"),
        LastK(name="recent", inputs=("history",), buckets=99, max_length=5, table="item"),
        Id(name="item", inputs=("item_id",), buckets=99, pooling="mean"),
        Bucketize(name="age", inputs=("age",), boundaries=(18.0, 30.5)),
        Combo(name="cross", inputs=("user_id", "item_id"), buckets=7, dim=4),
        Raw(name="price", inputs=("price",), clip=(0.0, 100.0), log1p=True),
    )
    assert spec.embedding_dim == 8
    assert spec.used_columns() == ("user_id", "age", "history", "item_id", "price")
    assert msgspec.json.decode(msgspec.json.encode(spec), type=FeatureSpec) == spec


@pytest.mark.parametrize(
    ("inputs", "side"),
    [
        (("user_id", "age"), "user"),
        (("user_id", "hour"), "context"),
        (("hour", "age"), "context"),
        (("item_id", "hour"), "cross"),
        (("item_id", "user_id"), "cross"),
    ],
)
def test_side_of_a_combo_comes_from_its_inputs(inputs: tuple[str, ...], side: str) -> None:
    assert declare(feature("combo", *inputs, buckets=3)).sides() == {"x": side}


@pytest.mark.parametrize(("column", "side"), [("user_id", "user"), ("hour", "context"), ("item_id", "item")])
def test_side_of_one_input_is_its_columns(column: str, side: str) -> None:
    assert declare(feature("id", column, buckets=3)).sides() == {"x": side}


@pytest.mark.parametrize(
    ("declared", "rows"),
    [
        (feature("id", "age", buckets=10), 10),
        (feature("id", "age", num_embeddings=10), 11),
        (feature("id", "age", num_embeddings=10, oov="drop"), 10),
        (feature("id", "user_id", vocabulary=["a", "b"]), 3),
        (feature("id", "user_id", vocabulary=["a", "b"], oov="drop"), 2),
        (feature("last_k", "history", vocabulary=["a", "b"], max_length=3), 3),
        (feature("bucketize", "age", boundaries=[1, 2, 3]), 4),
        (feature("combo", "age", "hour", buckets=12), 12),
    ],
)
def test_rows_of_the_table(declared: dict[str, Any], rows: int) -> None:
    (made,) = declare(declared).features
    assert not isinstance(made, Raw)
    assert made.rows == rows


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (feature("idd", "age"), r"^feature 'x': unknown op 'idd'; did you mean 'id'\? accepted: id, last_k, bucketize"),
        ({"name": "x", "inputs": ["age"]}, r"^feature 'x': key 'op' is missing; accepted: id, "),
        ({"op": "id"}, r"^features\[0\]: key 'name' is missing"),
        ({"op": "id", "name": "a/b"}, r"^features\[0\]: key 'name': found 'a/b'; accepted: a name of letters"),
        (3, r"^features\[0\]: found 3; accepted: a mapping"),
        (
            feature("id", "age", bukets=3),
            r"^feature 'x': unknown key 'bukets'; did you mean 'buckets'\? accepted: op, ",
        ),
        ({"name": "x", "op": "id", "buckets": 3}, r"^feature 'x': key 'inputs' is missing"),
        (
            feature("id", "user", buckets=3),
            r"^feature 'x': unknown column 'user'; did you mean 'user_id'\? accepted: us",
        ),
        (feature("id", "age", "hour", buckets=3), r"^feature 'x': inputs: found 2 columns; id reads exactly one"),
        (
            feature("id", "price", buckets=3),
            r"^feature 'x': column 'price' is float32; id accepts: string, int64, list",
        ),
        (feature("raw", "user_id"), r"^feature 'x': column 'user_id' is string; raw accepts: float32, int64"),
        (feature("raw", "scores"), r"^feature 'x': column 'scores' is list<float32>; raw accepts"),
        (
            feature("last_k", "age", buckets=3, max_length=2),
            r"^feature 'x': column 'age' is int64; last_k accepts: list",
        ),
        (
            feature("combo", "age", "history", buckets=3),
            r"^feature 'x': column 'history' is list<string>; combo accepts",
        ),
        (
            feature("bucketize", "user_id", boundaries=[1]),
            r"^feature 'x': column 'user_id' is string; bucketize accepts",
        ),
        (
            feature("id", "age"),
            r"^feature 'x': found none of them; accepted: exactly one of buckets, num_embeddings, v",
        ),
        (
            feature("id", "age", buckets=2, num_embeddings=3),
            r"^feature 'x': found buckets and num_embeddings; accepted",
        ),
        (feature("id", "age", buckets=0), r"^feature 'x': key 'buckets': found 0; accepted: int >= 1"),
        (feature("id", "age", buckets="9"), r"^feature 'x': key 'buckets': found '9'; accepted: int"),
        (feature("id", "age", buckets=9, oov="drop"), r"^feature 'x': oov: found 'drop' beside buckets"),
        (
            feature("id", "age", num_embeddings=9, oov="dorp"),
            r"'oov': found 'dorp'; did you mean 'drop'\? accepted: row, ",
        ),
        (
            feature("id", "user_id", num_embeddings=9),
            r"^feature 'x': num_embeddings takes .* is string; accepted .*: buc",
        ),
        (feature("id", "user_id", vocabulary=[]), r"^feature 'x': vocabulary: found an empty list"),
        (feature("id", "user_id", vocabulary=["a", "b", "a"]), r"^feature 'x': vocabulary: 'a' stands in it 2 times"),
        (
            feature("id", "user_id", vocabulary=["a", 1]),
            r"^feature 'x': vocabulary: found 1; accepted for a string col",
        ),
        (feature("id", "user_id", vocabulary=["a", ""]), r"^feature 'x': vocabulary: found ''; accepted for a string"),
        (feature("id", "age", vocabulary=["a"]), r"^feature 'x': vocabulary: found 'a'; accepted for an int64 column"),
        (feature("id", "age", vocabulary=[2**63]), r"^feature 'x': vocabulary: found 9223372036854775808; accepted"),
        (feature("id", "age", buckets=9, default="a"), r"^feature 'x': default: found 'a'; accepted for an int64 col"),
        (feature("id", "age", num_embeddings=9, oov="drop", default=9), r"^feature 'x': default 9 is an unknown value"),
        (feature("last_k", "history", buckets=9), r"^feature 'x': key 'max_length' is missing"),
        (
            feature("bucketize", "age", boundaries=[]),
            r"^feature 'x': boundaries: found \[\]; accepted: one number or more",
        ),
        (
            feature("bucketize", "age", boundaries=[1, 1]),
            r"^feature 'x': boundaries: found \[1.0, 1.0\]; accepted: .* each",
        ),
        (
            feature("bucketize", "price", boundaries=[1, 1 + 1e-12]),
            r"^feature 'x': boundaries: .* same number in float32",
        ),
        (
            feature("bucketize", "age", boundaries=[1, "b"]),
            r"key 'boundaries': found \[1, 'b'\] \(at \[1\]\); accepted: float",
        ),
        (
            feature("bucketize", "age", boundaries=[math.inf]),
            r"^feature 'x': key 'boundaries': found \[inf\]; accepted: fin",
        ),
        (
            feature("combo", "age", buckets=3),
            r"^feature 'x': inputs: found \['age'\]; combo reads two or more different",
        ),
        (
            feature("combo", "age", "age", buckets=3),
            r"^feature 'x': inputs: found \['age', 'age'\]; combo reads two or",
        ),
        (feature("raw", "price", clip=[2, 1]), r"^feature 'x': clip: found \[2.0, 1.0\]; accepted: lowest, highest"),
        (
            feature("raw", "price", clip=[1, 2, 3]),
            r"^feature 'x': key 'clip': found \[1, 2, 3\]; accepted: list of length 2",
        ),
        (feature("raw", "price", default=math.nan), r"^feature 'x': key 'default': found nan; accepted: finite"),
        (
            feature("raw", "price", zscore=[0, 0]),
            r"^feature 'x': zscore: found standard deviation 0.0; accepted: above 0",
        ),
        (
            feature("raw", "price", zscore=[0, 1], minmax=[0, 1]),
            r"^feature 'x': found zscore and minmax; accepted: at most",
        ),
        (
            feature("id", "age", buckets=3, pooling="max"),
            r"^feature 'x': key 'pooling': found 'max'; accepted: sum, mean",
        ),
        (feature("id", "age", buckets=3, table="a.b"), r"^feature 'x': key 'table': found 'a.b'; accepted: a name of"),
    ],
)
def test_a_wrong_feature_is_told_what_would_work(declared: Any, message: str) -> None:
    with pytest.raises(FeatureError, match=message) as caught:
        declare(declared)
    assert caught.value.field.startswith("features")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"columns": COLUMNS}, r"^key 'features' is missing; accepted: columns, features, embedding_dim"),
        ({"columns": COLUMNS, "features": [], "feature": []}, r"^unknown key 'feature'; did you mean 'features'\?"),
        ({"columns": COLUMNS, "features": []}, r"^features: found none"),
        ({"columns": COLUMNS, "features": {}}, r"^features: found dict; accepted: a list"),
        ({"columns": [], "features": []}, r"^columns: found \[\]; accepted: a mapping"),
        ({"columns": {"a": {"side": "user"}}, "features": []}, r"^column 'a': key 'type' is missing"),
        (
            {"columns": {"a": {"side": "usr", "type": "int64"}}, "features": []},
            r"^column 'a': key 'side': found 'usr'; did you mean 'user'\? accepted: user, context, item",
        ),
        (
            {"columns": {"a": {"side": "user", "type": "int46"}}, "features": []},
            r"^column 'a': key 'type': found 'int46'; did you mean 'int64'\? accepted: string, int64",
        ),
        ({"columns": {"a": 3}, "features": []}, r"^column 'a': found 3; accepted: a mapping"),
        ({"columns": {}, "features": [], "embedding_dim": 0}, r"'embedding_dim': found 0; accepted: int >= 1"),
    ],
)
def test_a_wrong_declaration_is_told_what_would_work(declared: Any, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        load_feature_spec(declared)


def sharing(**third: Any) -> list[dict[str, Any]]:
    common = {"op": "id", "inputs": ["item_id"], "table": "item_id", "buckets": 9}
    return [common | {"name": "a"}, common | {"name": "b"}, common | {"name": "c"} | third]


@pytest.mark.parametrize(
    ("third", "message"),
    [
        ({"dim": 8}, r"^table 'item_id': 3 features share it with dims 16, 16, 8; a shared table has one dim$"),
        ({"buckets": 8}, r"^table 'item_id': 3 features share it with rows 9, 9, 8; a shared table has one number of"),
        (
            {"buckets": None, "vocabulary": list("abcdefgh")},
            r"^table 'item_id': 3 features share it with ids of different meaning \(a, b, c\)",
        ),
    ],
)
def test_a_shared_table_has_one_geometry_and_one_meaning(third: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatureError, match=message) as caught:
        declare(*sharing(**third))
    assert caught.value.field == "features.c.table"
    declare(*sharing())


def test_a_name_is_declared_once() -> None:
    with pytest.raises(FeatureError, match=r"^feature 'x' is declared 2 times; accepted: once"):
        declare(feature("id", "age", buckets=3), feature("raw", "price"))


def test_a_spec_that_was_not_loaded_is_checked_by_the_transform() -> None:
    spec = FeatureSpec(columns={}, features=(Raw(name="x", inputs=("a",)),))
    with pytest.raises(FeatureError, match="unknown column 'a'"):
        FeatureTransform(spec)
