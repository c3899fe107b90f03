"""Raw columns: what is accepted from requests and from Arrow, what is refused, and in which words."""

from __future__ import annotations

import decimal
import math
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from torchrank.features.arrow_columns import column_from_arrow
from torchrank.features.columns import Floats, Ints, Lists, Strings, column_from_values
from torchrank.features.errors import FeatureError
from torchrank.features.spec import ColumnType, load_feature_spec
from torchrank.features.transform import FeatureTransform

TRANSFORM = FeatureTransform(
    load_feature_spec(
        {
            "columns": {
                "name": {"side": "user", "type": "string"},
                "recent": {"side": "user", "type": "list<string>"},
                "hour": {"side": "context", "type": "int64"},
                "price": {"side": "item", "type": "float32"},
                "tags": {"side": "item", "type": "list<int64>"},
            },
            "features": [
                {"name": "name", "op": "id", "inputs": ["name"], "buckets": 10},
                {"name": "recent", "op": "last_k", "inputs": ["recent"], "buckets": 10, "max_length": 2},
                {"name": "hour", "op": "id", "inputs": ["hour"], "num_embeddings": 24},
                {"name": "price", "op": "raw", "inputs": ["price"]},
                {"name": "tags", "op": "id", "inputs": ["tags"], "num_embeddings": 9},
            ],
        }
    )
)
USER: dict[str, Any] = {"name": "ann", "recent": ["a"]}
ITEM: dict[str, Any] = {"price": 1.5, "tags": [1]}


@pytest.mark.parametrize(
    ("field", "user", "context", "item", "message"),
    [
        ("user.name", {"name": 3}, {}, {}, "found int 3; accepted: a string or null"),
        ("user.name", {"name": b"x"}, {}, {}, "found bytes b'x'; accepted: a string or null"),
        ("user.name", {"name": "\ud800"}, {}, {}, r"found str '\\ud800'; accepted: text that UTF-8 can hold"),
        ("user.recent", {"recent": "abc"}, {}, {}, "found str 'abc'; accepted: a list of string or null"),
        ("user.recent[1]", {"recent": ["a", 2]}, {}, {}, "found int 2; accepted: a string or null"),
        ("context.hour", {}, {"hour": 3.0}, {}, "found float 3.0; accepted: an integer of 64 bits or null"),
        ("context.hour", {}, {"hour": "3"}, {}, "found str '3'; accepted: an integer of 64 bits or null"),
        ("context.hour", {}, {"hour": 2**63}, {}, "found int 9223372036854775808; accepted: an integer of 64 bits"),
        ("context.hour", {}, {"hour": 10**400}, {}, "found int 1000.*; accepted: an integer of 64 bits"),
        ("context.hour", {}, {"hour": [3]}, {}, r"found list \[3\]; accepted: an integer of 64 bits or null"),
        ("candidates[2].price", {}, {}, {"price": "1.5"}, "found str '1.5'; accepted: a number or null"),
        ("candidates[2].price", {}, {}, {"price": {}}, r"found dict \{\}; accepted: a number or null"),
        ("candidates[2].price", {}, {}, {"price": 10**400}, "found int 1000.*; accepted: a number or null"),
        (
            "candidates[2].price",
            {},
            {},
            {"price": math.inf},
            "found inf .*; feature 'price' has no finite value for it",
        ),
        ("candidates[2].price", {}, {}, {"price": -1e39}, "found -inf .*; feature 'price' has no finite value for it"),
        ("candidates[2].tags", {}, {}, {"tags": 4}, "found int 4; accepted: a list of int64 or null"),
        ("candidates[2].tags[3]", {}, {}, {"tags": [1, None, 3, "x"]}, "found str 'x'; accepted: an integer"),
        ("candidates[2].tags[0]", {}, {}, {"tags": [[1]]}, r"found list \[1\]; accepted: an integer"),
    ],
)
def test_a_wrong_value_names_its_field(
    field: str, user: dict[str, Any], context: dict[str, Any], item: dict[str, Any], message: str
) -> None:
    candidates = [ITEM, ITEM | {"price": None, "tags": None}, ITEM | item]
    with pytest.raises(FeatureError, match=message) as caught:
        TRANSFORM.from_request(USER | user, {"hour": 1} | context, candidates)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: found ")


def without(mapping: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    ("field", "user", "context", "candidates"),
    [
        ("user.recent", without(USER, "recent"), {"hour": 1}, [ITEM]),
        ("context.hour", USER, {}, [ITEM]),
        ("candidates[1].tags", USER, {"hour": 1}, [ITEM, without(ITEM, "tags")]),
    ],
)
def test_a_missing_key_is_an_error_and_null_is_not(
    field: str, user: dict[str, Any], context: dict[str, Any], candidates: list[dict[str, Any]]
) -> None:
    with pytest.raises(FeatureError, match="the field is missing; null says that its value is not known") as caught:
        TRANSFORM.from_request(user, context, candidates)
    assert caught.value.field == field
    nulls = TRANSFORM.from_request(dict.fromkeys(USER), {"hour": None}, [dict.fromkeys(ITEM)])
    assert [len(ragged.values) for ragged in (*nulls.user.sparse.values(), *nulls.item.sparse.values())] == [0, 0, 0, 0]
    assert nulls.item.dense.tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("field", "user", "candidates"),
    [("user", ["name"], [ITEM]), ("candidates[0]", USER, ["price"]), ("candidates[1]", USER, [ITEM, [1, 2]])],
)
def test_a_row_is_an_object(field: str, user: Any, candidates: Any) -> None:
    with pytest.raises(FeatureError, match="accepted: an object of fields") as caught:
        TRANSFORM.from_request(user, {"hour": 1}, candidates)
    assert caught.value.field == field


def test_the_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(FeatureError("user.age: wrong", "user.age")))  # noqa: S301 (what multiprocessing does)
    assert (str(error), error.field) == ("user.age: wrong", "user.age")


def values_of(column: Strings | Ints | Floats | Lists) -> list[Any]:
    if isinstance(column, Strings):
        return [bytes(column.data[a:b]).decode() for a, b in zip(column.offsets, column.offsets[1:], strict=False)]
    if isinstance(column, Lists):
        elements = values_of(column.elements)
        rows = [elements[a:b] for a, b in zip(column.offsets, column.offsets[1:], strict=False)]
        return [None if len(column.missing) and column.missing[i] else row for i, row in enumerate(rows)]
    if isinstance(column, Floats):
        return [None if math.isnan(value) else value for value in column.values.tolist()]
    missing = column.missing if len(column.missing) else np.zeros(len(column), dtype=bool)
    return [None if absent else value for value, absent in zip(column.values.tolist(), missing, strict=True)]


@pytest.mark.parametrize(
    ("array", "kind", "expected"),
    [
        (pa.array(["a", None, "é"]), "string", ["a", "", "é"]),
        (pa.array(["a", None, "é"]).dictionary_encode(), "string", ["a", "", "é"]),
        (pa.array(["a", None, "é"], pa.large_string()).slice(1), "string", ["", "é"]),
        (pa.array([None, None]), "string", ["", ""]),
        (pa.array([], pa.string()), "string", []),
        (pa.array([1, None, -3], pa.int8()), "int64", [1, None, -3]),
        (pa.array([1, None, 2**63 - 1], pa.uint64()), "int64", [1, None, 2**63 - 1]),
        (pa.array([5, None, 6]).slice(1), "int64", [None, 6]),
        (pa.array([True, None, False]), "int64", [1, None, 0]),
        (pa.array([7, 8, 7]).dictionary_encode(), "int64", [7, 8, 7]),
        (pa.array([None, None]), "int64", [None, None]),
        (pa.array([], pa.int64()), "int64", []),
        (pa.array([0.1, None, math.nan]), "float32", [float(np.float32(0.1)), None, None]),
        (pa.array([0.5, 1.5], pa.float16()), "float32", [0.5, 1.5]),
        (pa.array([16777217, None]), "float32", [16777216.0, None]),
        (pa.array([decimal.Decimal("1.25"), None]), "float32", [1.25, None]),
        (pa.array([True, None]), "float32", [1.0, None]),
        (pa.array([None, None]), "float32", [None, None]),
        (pa.array([["a"], None, [], ["b", None]]).slice(1), "list<string>", [None, [], ["b", ""]]),
        (pa.array([[1, 2], None, [3, None]], pa.list_(pa.int32(), 2)), "list<int64>", [[1, 2], None, [3, None]]),
        (
            pa.array([["x"], ["y", "x"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
            "list<string>",
            [["x"], ["y", "x"]],
        ),
        (pa.array([[1.5], []], pa.large_list(pa.float64())), "list<float32>", [[1.5], []]),
        (pa.array([None, None]), "list<int64>", [None, None]),
        (pa.array([[], None], pa.list_(pa.null())), "list<string>", [[], None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else None,
)
def test_arrow_types_that_are_accepted(array: pa.Array, kind: ColumnType, expected: list[Any]) -> None:
    found = values_of(column_from_arrow("c", array, kind))
    assert [None if row is None and kind.startswith("list") else row for row in found] == expected
    chunked = pa.chunked_array([array, array], type=array.type)
    assert values_of(column_from_arrow("c", chunked, kind)) == expected * 2
    rows = np.arange(len(array))[::-1]
    assert values_of(column_from_arrow("c", array, kind, rows)) == expected[::-1]


@pytest.mark.parametrize(
    ("array", "kind", "message"),
    [
        (pa.array([1]), "string", "^column 'c': found int64; accepted for string: string, large_string"),
        (pa.array([b"x"]), "string", "^column 'c': found binary; accepted for string"),
        (pa.array([1.0]), "int64", "^column 'c': found double; accepted for int64: integers, bool"),
        (pa.array(["1"]), "int64", "^column 'c': found string; accepted for int64"),
        (pa.array([2**63], pa.uint64()), "int64", "^column 'c': Integer value 9223372036854775808 not in range"),
        (pa.array(["1"]), "float32", "^column 'c': found string; accepted for float32: floats, integers"),
        (pa.array([0], pa.timestamp("s")), "int64", r"^column 'c': found timestamp\[s\]; accepted for int64"),
        (pa.array(["x"]), "list<string>", "^column 'c': found string; accepted for list<string>: list, large_list"),
        (pa.array([["x"]]), "list<int64>", "^column 'c': found string; accepted for int64"),
        (pa.array([["x"]]), "string", "^column 'c': found list<.*string>; accepted for string"),
        (
            pa.array([["x"]], pa.list_view(pa.string())),
            "list<string>",
            "^column 'c': found list_view<.*>; accepted for",
        ),
    ],
)
def test_arrow_types_that_are_refused(array: pa.Array, kind: ColumnType, message: str) -> None:
    with pytest.raises(FeatureError, match=message) as caught:
        column_from_arrow("c", array, kind)
    assert caught.value.field == "c"


def test_text_and_elements_that_a_null_hides_are_not_seen() -> None:
    """Arrow allows a null slot to cover bytes; a filter that only clears the validity bit leaves them there."""
    offsets = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    validity = pa.py_buffer(b"\x05")
    strings = pa.Array.from_buffers(pa.string(), 3, [validity, offsets, pa.py_buffer(b"abcd")])
    assert values_of(column_from_arrow("c", strings, "string")) == ["a", "", "d"]
    lists = pa.Array.from_buffers(pa.list_(pa.int64()), 3, [validity, offsets], children=[pa.array([1, 2, 3, 4])])
    batch = pa.RecordBatch.from_arrays([lists, pa.array([1.0] * 3)], names=["tags", "price"])
    transform = FeatureTransform(
        load_feature_spec(
            {
                "columns": {"tags": {"side": "item", "type": "list<int64>"}},
                "features": [{"name": "tags", "op": "id", "inputs": ["tags"], "num_embeddings": 9, "default": 7}],
            }
        )
    )
    ragged = transform.from_arrow(batch).item.sparse["tags"]
    assert (ragged.values.tolist(), ragged.offsets.tolist()) == ([1, 7, 4], [0, 1, 2, 3])


def test_text_is_not_copied() -> None:
    array = pa.array(["some", "text"])
    column = column_from_arrow("c", array, "string")
    assert isinstance(column, Strings)
    assert column.data.ctypes.data == array.buffers()[2].address


@pytest.mark.parametrize(
    ("columns", "message", "field"),
    [
        ({"nam": ["x"]}, r"^column 'name' is missing; did you mean 'nam'\? accepted: nam", "name"),
        ({"name": [3]}, "^column 'name': found int64; accepted for string", "name"),
    ],
)
def test_a_batch_without_its_columns(columns: dict[str, Any], message: str, field: str) -> None:
    with pytest.raises(FeatureError, match=message) as caught:
        TRANSFORM.from_arrow(pa.RecordBatch.from_pydict(columns))
    assert caught.value.field == field


def test_an_infinite_value_in_a_file_names_column_and_row() -> None:
    batch = pa.RecordBatch.from_pylist([USER | ITEM | {"hour": 1}, USER | ITEM | {"hour": 2, "price": math.inf}])
    with pytest.raises(
        FeatureError, match=r"^price: found inf \(row 1\); feature 'price' has no finite value"
    ) as caught:
        TRANSFORM.from_arrow(batch)
    assert caught.value.field == "price"


def test_a_request_column_has_no_nulls() -> None:
    batch = pa.RecordBatch.from_pylist([USER | ITEM | {"hour": 1, "r": "a"}, USER | ITEM | {"hour": 1, "r": None}])
    with pytest.raises(FeatureError, match=r"^column 'r': row 1 is null; a request column"):
        TRANSFORM.from_arrow(batch, request_column="r")


def test_mixed_and_numpy_scalars_are_numbers() -> None:
    column = column_from_values([1, None, np.float32(2.5), True, np.int8(3)], "float32", str)
    assert values_of(column) == [1.0, None, 2.5, 1.0, 3.0]
    column = column_from_values([True, None, np.int32(2), -(2**63)], "int64", str)
    assert values_of(column) == [1, None, 2, -(2**63)]
