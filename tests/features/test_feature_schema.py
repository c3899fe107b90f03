"""Where features sit in a model's inputs."""

from __future__ import annotations

import pytest

from torchrank.features.errors import FeatureError
from torchrank.features.schema import EmbeddingGroup, SequenceSlot, Slot, TableSpec, build_schema
from torchrank.features.spec import FeatureSpec, load_feature_spec


@pytest.fixture
def spec() -> FeatureSpec:
    """Features on purpose in another order than their sides."""
    return load_feature_spec(
        {
            "embedding_dim": 4,
            "columns": {
                "user": {"side": "user", "type": "string"},
                "recent": {"side": "user", "type": "list<string>"},
                "hour": {"side": "context", "type": "int64"},
                "item": {"side": "item", "type": "string"},
                "tags": {"side": "item", "type": "list<string>"},
                "price": {"side": "item", "type": "float32"},
                "age": {"side": "user", "type": "float32"},
            },
            "features": [
                {"name": "item", "op": "id", "inputs": ["item"], "buckets": 100},
                {"name": "user", "op": "id", "inputs": ["user"], "buckets": 50, "dim": 8, "pooling": "mean"},
                {"name": "price", "op": "raw", "inputs": ["price"]},
                {
                    "name": "recent",
                    "op": "last_k",
                    "inputs": ["recent"],
                    "buckets": 100,
                    "table": "item",
                    "max_length": 3,
                },
                {"name": "hour", "op": "bucketize", "inputs": ["hour"], "boundaries": [6, 18]},
                {"name": "cross", "op": "combo", "inputs": ["user", "item"], "buckets": 7},
                {"name": "tag_list", "op": "last_k", "inputs": ["tags"], "buckets": 9, "max_length": 2},
                {"name": "age", "op": "raw", "inputs": ["age"]},
            ],
        }
    )


def test_one_group_of_everything(spec: FeatureSpec) -> None:
    schema = build_schema(spec, ["click", "finish"])
    assert schema.user_pooled == (
        Slot("deep", "user", "user", 8, 0, "mean"),
        Slot("deep", "hour", "hour", 4, 8, "sum"),
    )
    assert schema.item_pooled == (
        Slot("deep", "item", "item", 4, 0, "sum"),
        Slot("deep", "cross", "cross", 4, 4, "sum"),
    )
    assert (schema.user_dense, schema.item_dense) == (("age",), ("price",))
    assert schema.sequences == (
        SequenceSlot("recent", "deep", "recent", "item", 4, 3, "user"),
        SequenceSlot("tag_list", "deep", "tag_list", "tag_list", 4, 2, "item"),
    )
    assert schema.tables == (
        TableSpec("item", 100, 4, ("item", "recent")),
        TableSpec("user", 50, 8, ("user",)),
        TableSpec("hour", 3, 4, ("hour",)),
        TableSpec("cross", 7, 4, ("cross",)),
        TableSpec("tag_list", 9, 4, ("tag_list",)),
    )
    assert schema.tasks == ("click", "finish")


def test_groups_come_in_their_order_and_features_in_the_specs(spec: FeatureSpec) -> None:
    groups = {"wide": EmbeddingGroup(features=("recent", "cross", "item"), dim=1), "deep": EmbeddingGroup(("item",))}
    schema = build_schema(spec, ["click"], groups)
    assert schema.user_pooled == ()
    assert schema.item_pooled == (
        Slot("wide", "item", "wide.item", 1, 0, "sum"),
        Slot("wide", "cross", "wide.cross", 1, 1, "sum"),
        Slot("deep", "item", "item", 4, 2, "sum"),
    )
    assert schema.sequences == (SequenceSlot("wide.recent", "wide", "recent", "wide.item", 1, 3, "user"),)
    assert schema.tables == (
        TableSpec("wide.item", 100, 1, ("item", "recent")),
        TableSpec("wide.cross", 7, 1, ("cross",)),
        TableSpec("item", 100, 4, ("item",)),
    )


@pytest.mark.parametrize(
    ("tasks", "groups", "message"),
    [
        ([], None, "tasks: found none"),
        (["click", "click"], None, "task 'click': the name is taken"),
        (["user_dense"], None, "task 'user_dense': the name is taken"),
        (["recent"], None, "task 'recent': the name is taken"),
        (["a b"], None, r"tasks\[0\]: found 'a b'; accepted: a name"),
        (["t"], {"deep": EmbeddingGroup(("itm",))}, "group 'deep': no sparse feature 'itm'; did you mean 'item'"),
        (["t"], {"deep": EmbeddingGroup(("price",))}, "group 'deep': no sparse feature 'price'"),
        (["t"], {"deep": EmbeddingGroup(("item", "item"))}, "group 'deep': found item, item; accepted: each one once"),
        (["t"], {"a.b": EmbeddingGroup()}, "embedding group 'a.b': found 'a.b'; accepted: a name"),
    ],
)
def test_wrong_requests(
    spec: FeatureSpec, tasks: list[str], groups: dict[str, EmbeddingGroup] | None, message: str
) -> None:
    with pytest.raises(FeatureError, match=message):
        build_schema(spec, tasks, groups)


def test_a_sequence_cannot_take_the_name_of_an_input() -> None:
    spec = load_feature_spec(
        {
            "columns": {"h": {"side": "user", "type": "list<string>"}},
            "features": [{"name": "user_pooled", "op": "last_k", "inputs": ["h"], "buckets": 3, "max_length": 2}],
        }
    )
    with pytest.raises(FeatureError, match="sequence feature 'user_pooled': the name is taken"):
        build_schema(spec, ["click"])
