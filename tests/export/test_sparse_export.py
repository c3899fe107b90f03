"""Tables of raw 64-bit ids from a checkpoint to the inputs of a model: export, publish, look-up, assembly."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from numpy.typing import NDArray

from embedding_store.errors import InvalidRelease
from embedding_store.open import open_backend, open_store
from embedding_store.publish import publish
from embedding_store.release import ReleaseManifest
from export.assemble import Assembler
from export.build import ExportOptions, export_run
from export.bundle import read_golden
from export.checkpoint_tables import CheckpointTables
from export.table_pages import write_table
from tests.redis_server import RedisServer
from tests.tiny import copy_run
from torchrank.features.batch import FeatureBatch, Ragged, SideBatch
from torchrank.features.schema import FeatureSchema, build_schema
from torchrank.features.spec import load_feature_spec
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run

BAGS = "model.embeddings.pooled.embedding_bags.table"
DIM, USERS, ITEMS, U, N = 6, 40, 300, 3, 11
SPEC = {
    "embedding_dim": DIM,
    "columns": {
        "user": {"side": "user", "type": "int64"},
        "seen": {"side": "user", "type": "list<int64>"},
        "item": {"side": "item", "type": "int64"},
    },
    "features": [
        {"name": "user", "op": "id", "inputs": ["user"], "num_embeddings": USERS},
        {"name": "item", "op": "id", "inputs": ["item"], "num_embeddings": ITEMS, "pooling": "mean"},
        {"name": "seen", "op": "last_k", "inputs": ["seen"], "num_embeddings": ITEMS, "table": "item", "max_length": 4},
    ],
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()


@pytest.fixture
def schema() -> FeatureSchema:
    return build_schema(load_feature_spec(SPEC), ["click"])


def raw_items(rng: np.random.Generator) -> NDArray[np.int64]:
    extremes = np.array([0, -1, 2**63 - 1, -(2**63)])
    return rng.permutation(np.concatenate((extremes, rng.integers(-(2**63), 2**63 - 1, ITEMS - 4))))


def save_checkpoint(folder: Path, tables: dict[str, NDArray[np.float32]], item_ids: NDArray[np.int64]) -> Path:
    state = {f"{BAGS}/{name}.weight": torch.from_numpy(rows) for name, rows in tables.items()}
    dcp.save(state | {f"{BAGS}/item.ids": torch.from_numpy(item_ids)}, checkpoint_id=folder, no_dist=True)
    return folder


def random_tables(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    return {
        "user": rng.standard_normal((USERS, DIM)).astype(np.float32),
        "item": rng.standard_normal((ITEMS, DIM)).astype(np.float32),
    }


def write_bundle(folder: Path, checkpoint: Path, take: dict[str, list]) -> ReleaseManifest:
    """A bundle's tables and the part of its manifest that a store reads."""
    (folder / "tables").mkdir(parents=True)
    saved = CheckpointTables(checkpoint)
    tables = []
    for name in saved.tables:
        chunks = take.setdefault(name, [])
        hot = np.concatenate(list(saved.raw_ids(name)))[:5] if saved.tables[name].ids_key else np.arange(5)
        seen = lambda ids, rows, chunks=chunks: chunks.append((ids.copy(), rows.copy()))  # noqa: E731
        tables.append(write_table(saved, name, folder / "tables", "fp32", hot, seen))
    manifest = ReleaseManifest("m", "1", "2026-01-02T03:04:05Z", tuple(tables))
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return manifest


def ragged(rng: np.random.Generator, rows: int, most: int, ids: NDArray[np.int64]) -> Ragged:
    offsets = np.concatenate(([0], np.cumsum(rng.integers(0, most + 1, rows)))).astype(np.int64)
    return Ragged(rng.choice(ids, offsets[-1]), offsets, None)


def vectors(rows: dict[int, NDArray[np.float32]], bag: Ragged, row: int) -> NDArray[np.float64]:
    ids = bag.values[bag.offsets[row] : bag.offsets[row + 1]].tolist()
    return np.array([rows.get(key, np.zeros(DIM)) for key in ids], np.float64).reshape(-1, DIM)


@pytest.mark.parametrize("kind", ["memmap", "redis"])
@pytest.mark.parametrize("seed", range(3))
def test_a_checkpoint_with_raw_ids_reaches_the_models_inputs(
    kind: str, seed: int, schema: FeatureSchema, tmp_path: Path, redis_server: RedisServer
) -> None:
    rng = np.random.default_rng(seed)
    tables, items = random_tables(rng), raw_items(rng)
    taken: dict[str, list] = {}
    manifest = write_bundle(tmp_path / "bundle", save_checkpoint(tmp_path / "checkpoint", tables, items), taken)
    assert {table.name: table.ids for table in manifest.tables} == {"user": "dense", "item": "sparse"}
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in taken["item"]]), items)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in taken["item"]]), tables["item"])

    url = redis_server.url if kind == "redis" else f"memmap://{tmp_path / 'store'}"
    with open_backend(url) as backend:
        publish(tmp_path / "bundle", backend)
    known_or_not = np.concatenate((items, rng.integers(-(2**63), 2**63 - 1, 60)))
    user = {"user": ragged(rng, U, 1, np.arange(USERS + 5)), "seen": ragged(rng, U, 7, known_or_not)}
    item = {"item": ragged(rng, N, 3, known_or_not)}
    none = np.empty((0, 0), np.float32)
    batch = FeatureBatch(SideBatch(U, user, none), SideBatch(N, item, none), np.sort(rng.integers(0, U, N)))
    assembler = Assembler(schema, manifest.tables, dict.fromkeys(["user_pooled", "item_pooled", "seen"], np.float32))
    with open_store(url, cache_bytes=1 << 20) as store:
        for _ in range(2):  # out of the store, then out of the cache
            feed = assembler.inputs(batch, store.lookup("m@1", assembler.ids(batch)))
            rows = {
                "user": dict(enumerate(tables["user"])),
                "item": dict(zip(items.tolist(), tables["item"], strict=True)),
            }
            for r in range(U):
                np.testing.assert_allclose(
                    feed["user_pooled"][r], vectors(rows["user"], user["user"], r).sum(axis=0), atol=1e-6
                )
                expected = np.zeros((4, DIM))
                found = vectors(rows["item"], user["seen"], r)[:4]
                expected[: len(found)] = found
                np.testing.assert_array_equal(feed["seen"][r], expected.astype(np.float32))
            for r in range(N):
                found = vectors(rows["item"], item["item"], r)
                mean = found.mean(axis=0) if len(found) else np.zeros(DIM)
                np.testing.assert_allclose(feed["item_pooled"][r], mean, atol=1e-6)


def test_an_id_of_two_rows_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    items = raw_items(rng)
    items[17] = items[200]
    checkpoint = save_checkpoint(tmp_path / "checkpoint", random_tables(rng), items)
    with pytest.raises(InvalidRelease, match=f"table 'item': id {items[17]} is given twice"):
        write_bundle(tmp_path / "bundle", checkpoint, {})


def test_ids_that_are_not_one_for_each_row_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    checkpoint = save_checkpoint(tmp_path / "checkpoint", random_tables(rng), raw_items(rng)[:-1])
    with pytest.raises(ValueError, match=r"ids of table 'item' are torch.int64 \[299\]; expected torch.int64 \[300\]"):
        CheckpointTables(checkpoint)


def test_an_exported_run_scores_alike_with_its_rows_under_raw_ids(tiny_run: Path, tmp_path: Path) -> None:
    """The rows of a table in another order: what the trainer says stays, and the bundle passes the gate."""

    def give_ids(state: dict[str, torch.Tensor]) -> None:
        key = next(key for key in state if key.startswith("model.") and key.endswith("/item_id.weight"))
        order = torch.randperm(len(state[key]), generator=torch.Generator().manual_seed(3))
        state[key] = state[key][order].clone()
        state[key.removesuffix("weight") + "ids"] = order

    edited = copy_run(tiny_run, tmp_path / "run", give_ids)
    plain = export_run(Run(tiny_run), tmp_path / "plain", ExportOptions(version="1"))
    sparse = export_run(Run(edited), tmp_path / "sparse", ExportOptions(version="1", row_codec="int8"))
    kinds = {table.name: table.ids for table in sparse.tables}
    assert kinds.pop("item_id") == "sparse"
    assert set(kinds.values()) == {"dense"}
    assert 0 < sparse.variants[0].max_abs_diff < 1e-2
    assert [g.scores for g in read_golden(tmp_path / "sparse")] == [g.scores for g in read_golden(tmp_path / "plain")]
    dense_table = next(table for table in plain.tables if table.name == "item_id")
    sparse_table = next(table for table in sparse.tables if table.name == "item_id")
    assert (sparse_table.rows, sparse_table.hot_ids) == (dense_table.rows, dense_table.hot_ids)
