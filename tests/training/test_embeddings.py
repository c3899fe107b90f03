"""Embedding look-ups, unsharded, against a loop over rows; and the tables that sharding treats differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from torchrank.data.torch_batch import lookup_keys, to_torch
from torchrank.features.batch import FeatureBatch, Ragged, SideBatch
from torchrank.features.schema import EmbeddingGroup, FeatureSchema, build_schema
from torchrank.features.spec import load_feature_spec
from torchrank.train import train
from torchrank.training.embeddings import Embeddings
from torchrank.training.sharding import table_name

Weights = dict[str, NDArray[np.float32]]

SPEC = {
    "embedding_dim": 8,
    "columns": {
        "user": {"side": "user", "type": "string"},
        "seen": {"side": "user", "type": "list<string>"},
        "liked": {"side": "user", "type": "list<string>"},
        "hour": {"side": "context", "type": "int64"},
        "item": {"side": "item", "type": "string"},
        "similar": {"side": "item", "type": "list<string>"},
        "tags": {"side": "item", "type": "list<string>"},
        "styles": {"side": "item", "type": "list<string>"},
        "price": {"side": "item", "type": "float32"},
    },
    "features": [
        {"name": "user", "op": "id", "inputs": ["user"], "buckets": 13},
        {"name": "hour", "op": "id", "inputs": ["hour"], "num_embeddings": 24, "oov": "drop", "dim": 4},
        # a sequence of the user's, one of the item's, and the candidate itself share a table
        {"name": "seen", "op": "last_k", "inputs": ["seen"], "max_length": 4, "buckets": 17, "table": "item"},
        {"name": "item", "op": "id", "inputs": ["item"], "buckets": 17},
        {"name": "similar", "op": "last_k", "inputs": ["similar"], "max_length": 3, "buckets": 17, "table": "item"},
        # bags of three sizes in one table, two of them with one pooling on either side: an EmbeddingBagCollection
        {"name": "liked", "op": "id", "inputs": ["liked"], "buckets": 11, "pooling": "mean", "table": "tags"},
        {"name": "tags", "op": "id", "inputs": ["tags"], "buckets": 11, "pooling": "mean"},
        # two poolings of one table
        {"name": "style_sum", "op": "id", "inputs": ["styles"], "buckets": 7, "table": "style"},
        {"name": "style_mean", "op": "id", "inputs": ["styles"], "buckets": 7, "pooling": "mean", "table": "style"},
        # names that a ModuleDict refuses as keys
        {"name": "type", "op": "id", "inputs": ["item"], "buckets": 5},
        {"name": "items", "op": "combo", "inputs": ["user", "item"], "buckets": 19},
        {"name": "price", "op": "raw", "inputs": ["price"]},
    ],
}
GROUPS = {
    "deep only": {"deep": EmbeddingGroup()},
    "wide of dim 4": {"deep": EmbeddingGroup(), "wide": EmbeddingGroup(("user", "item", "tags", "seen"), dim=4)},
    "wide of dim 1": {"wide": EmbeddingGroup(dim=1), "deep": EmbeddingGroup()},
    "without sequences": {"deep": EmbeddingGroup(("user", "hour", "item", "tags", "liked"))},
    "one table": {"deep": EmbeddingGroup(("style_mean",))},
}


def random_batch(schema: FeatureSchema, rng: np.random.Generator) -> FeatureBatch:
    users = int(rng.integers(1, 6))
    user_index = np.sort(np.concatenate([np.arange(users), rng.integers(0, users, int(rng.integers(0, 20)))]))
    rows = {"user": users, "item": len(user_index)}
    table_rows = {table.name: table.rows for table in schema.tables}
    longest = {slot.feature: slot.max_length for slot in schema.sequences}
    side_of = {slot.feature: "user" for slot in schema.user_pooled} | {s.feature: "item" for s in schema.item_pooled}
    side_of |= {slot.feature: slot.rows for slot in schema.sequences}
    table_of_feature = {slot.feature: slot.table for slot in (*schema.user_pooled, *schema.item_pooled)}
    table_of_feature |= {slot.feature: slot.table for slot in schema.sequences}

    sparse: dict[str, dict[str, Ragged]] = {"user": {}, "item": {}}
    for feature, side in side_of.items():
        lengths = rng.integers(0, longest.get(feature, 4) + 1, rows[side])
        if rng.random() < 0.2:
            lengths[:] = 0
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = rng.integers(0, table_rows[table_of_feature[feature]], offsets[-1])
        sparse[side][feature] = Ragged(values, offsets)
    dense = {"user": len(schema.user_dense), "item": len(schema.item_dense)}
    sides = {
        side: SideBatch(count, sparse[side], rng.normal(size=(count, dense[side])).astype(np.float32))
        for side, count in rows.items()
    }
    return FeatureBatch(sides["user"], sides["item"], user_index)


def filled(schema: FeatureSchema, rng: np.random.Generator, replicated: tuple[str, ...]) -> tuple[Embeddings, Weights]:
    embeddings = Embeddings(schema, replicated).to_empty(device=torch.device("cpu"))
    weights = {table.name: rng.normal(size=(table.rows, table.dim)).astype(np.float32) for table in schema.tables}
    found = embeddings.state_dict()
    names = {key: table_name(f"embeddings.{key}") for key in found}
    assert sorted(map(str, names.values())) == sorted(weights)  # each table once
    embeddings.load_state_dict({key: torch.from_numpy(weights[str(name)]) for key, name in names.items()})
    return embeddings, weights


def naive_pooled(slots, side: SideBatch, weights: Weights) -> NDArray[np.float64]:
    out = np.zeros((side.rows, sum(slot.dim for slot in slots)))
    for slot in slots:
        ids = side.sparse[slot.feature]
        for row in range(side.rows):
            found = [
                weights[slot.table][id].astype(float) for id in ids.values[ids.offsets[row] : ids.offsets[row + 1]]
            ]
            if found:
                total = np.sum(found, axis=0)
                pooled = total / len(found) if slot.pooling == "mean" else total
                out[row, slot.start : slot.start + slot.dim] = pooled
    return out


def naive_sequence(slot, side: SideBatch, weights: Weights) -> NDArray[np.float64]:
    out = np.zeros((side.rows, slot.max_length, slot.dim))
    ids = side.sparse[slot.feature]
    for row in range(side.rows):
        for position, id in enumerate(ids.values[ids.offsets[row] : ids.offsets[row + 1]]):
            out[row, position] = weights[slot.table][id]
    return out


@pytest.mark.parametrize("replicated", [(), ("item", "style")], ids=["sharded", "replicated"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_inputs_equal_a_loop_over_rows(groups: dict[str, EmbeddingGroup], replicated: tuple[str, ...]) -> None:
    schema = build_schema(load_feature_spec(SPEC), ["click"], groups)
    for seed in range(25):
        print(f"seed {seed}")
        rng = np.random.default_rng(seed)
        embeddings, weights = filled(schema, rng, replicated)
        batch = random_batch(schema, rng)
        inputs = embeddings(to_torch(batch, {}, schema))

        def same(found: torch.Tensor, expected: NDArray[np.float64]) -> None:
            np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5, rtol=0, strict=False)
            assert tuple(found.shape) == expected.shape

        same(inputs.user_pooled, naive_pooled(schema.user_pooled, batch.user, weights))
        same(inputs.item_pooled, naive_pooled(schema.item_pooled, batch.item, weights))
        assert inputs.sequences.keys() == inputs.lengths.keys() == {slot.name for slot in schema.sequences}
        for slot in schema.sequences:
            side = batch.user if slot.rows == "user" else batch.item
            same(inputs.sequences[slot.name], naive_sequence(slot, side, weights))
            np.testing.assert_array_equal(inputs.lengths[slot.name], side.sparse[slot.feature].lengths)
        np.testing.assert_array_equal(inputs.user_dense, batch.user.dense)
        np.testing.assert_array_equal(inputs.item_dense, batch.item.dense)
        np.testing.assert_array_equal(inputs.user_index, batch.user_index)


def test_gradients_are_those_of_the_rows_that_were_read() -> None:
    """d(Σ r ∘ inputs) / d(table), r random: what candidates, bags and sequences read of a shared table adds up."""
    schema = build_schema(load_feature_spec(SPEC), ["click"])
    rng = np.random.default_rng(7)
    embeddings, weights = filled(schema, rng, ())
    batch = random_batch(schema, rng)
    inputs = embeddings(to_torch(batch, {}, schema))
    expected = {name: np.zeros(table.shape) for name, table in weights.items()}
    total = torch.zeros(())
    for pooled, slots, side in (
        (inputs.user_pooled, schema.user_pooled, batch.user),
        (inputs.item_pooled, schema.item_pooled, batch.item),
    ):
        r = rng.normal(size=tuple(pooled.shape)).astype(np.float32)
        total = total + (torch.from_numpy(r) * pooled).sum()
        for slot in slots:
            ids = side.sparse[slot.feature]
            for row, count in enumerate(ids.lengths):
                for id in ids.values[ids.offsets[row] : ids.offsets[row + 1]]:
                    share = count if slot.pooling == "mean" else 1
                    expected[slot.table][id] += r[row, slot.start : slot.start + slot.dim] / share
    for slot in schema.sequences:
        side = batch.user if slot.rows == "user" else batch.item
        ids = side.sparse[slot.feature]
        r = rng.normal(size=tuple(inputs.sequences[slot.name].shape)).astype(np.float32)
        total = total + (torch.from_numpy(r) * inputs.sequences[slot.name]).sum()
        for row in range(side.rows):
            for position, id in enumerate(ids.values[ids.offsets[row] : ids.offsets[row + 1]]):
                expected[slot.table][id] += r[row, position]
    total.backward()
    for key, parameter in embeddings.named_parameters():
        table = table_name(f"embeddings.{key}")
        assert table is not None
        assert parameter.grad is not None, key
        np.testing.assert_allclose(parameter.grad, expected[table], atol=1e-5, rtol=0, err_msg=table)


def test_a_table_of_a_sequence_or_of_two_poolings_is_unpooled_with_all_its_features() -> None:
    schema = build_schema(load_feature_spec(SPEC), ["click"])
    pooled, unpooled = lookup_keys(schema)
    assert {key.table for key in unpooled} == {"item", "style"}
    assert {key.table for key in pooled} == {"user", "hour", "tags", "type", "items"}
    assert [key.name for key in unpooled if key.table == "item"] == ["deep/item", "deep/seen", "deep/similar"]


WIDE = "{_target_: tests.wide_model.WideAndDeep}"
SHORT = ("training.max_steps=3", "training.validation_rows=100")


def test_tables_of_a_dim_that_fbgemm_cannot_shard_are_copies_on_every_rank(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """`wide` has dim 1: sharding=auto makes those tables data-parallel; the rest is the planner's."""
    train(composed(*SHORT, model=WIDE))
    plan = {table["table"]: table["sharding"] for table in json.loads((tmp_path / "run" / "plan.json").read_text())}
    wide = {table for table in plan if table.startswith("wide.")}
    assert wide == {"wide.user_id", "wide.item_id", "wide.tags"}
    assert {plan[table] for table in wide} == {"data_parallel"}
    assert "data_parallel" not in {plan[table] for table in plan.keys() - wide}


def test_such_a_table_cannot_be_sharded_on_demand(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    message = "table 'wide.user_id' has dim 1; row_wise sharding takes multiples of 4, other dims are data_parallel"
    with pytest.raises(ValueError, match=message) as caught:
        train(composed(*SHORT, "sharding=row_wise", model=WIDE))
    assert str(caught.value).endswith('"+sharding.tables={wide.user_id: data_parallel}"')  # what to type
    tables = "+sharding.tables={wide.user_id: data_parallel, wide.item_id: data_parallel, wide.tags: data_parallel}"
    train(composed(*SHORT, "sharding=row_wise", tables, run="mended", model=WIDE))
    plan = {table["table"]: table["sharding"] for table in json.loads((tmp_path / "mended" / "plan.json").read_text())}
    assert (plan["wide.user_id"], plan["user_id"]) == ("data_parallel", "row_wise")
