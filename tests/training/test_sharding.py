"""A sharded run is an unsharded one: same seed, same global batches, one rank or two, however the tables lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.tiny import run_module

RUNS = (
    "data_parallel-adagrad",
    "table_wise-adagrad",
    "column_wise-adagrad",
    "auto-adagrad",
    "row_wise-adagrad",
    "row_wise-sgd",
    "row_wise-rowwise_adagrad",
    "mixed",
)
BATCH = 128


def run_ranks(world_size: int, data: Path, output: Path) -> None:
    output.mkdir()
    done = run_module("tests.training.sharding_worker", str(data), str(output), cwd=output, ranks=world_size)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def outputs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """World size -> folder of runs. One rank reads the rows in the order in which two ranks together take them."""
    folder = tmp_path_factory.mktemp("sharding")
    train = pq.read_table(tiny_data / "train.parquet")
    halves = np.arange(train.num_rows).reshape(2, -1, BATCH // 2)  # [rank, step, row]
    one = folder / "one"
    one.mkdir()
    pq.write_table(train.take(halves.transpose(1, 0, 2).reshape(-1)), one / "train.parquet")
    pq.write_table(pq.read_table(tiny_data / "valid.parquet"), one / "valid.parquet")
    run_ranks(1, one, folder / "1")
    run_ranks(2, tiny_data, folder / "2")
    return {1: folder / "1", 2: folder / "2"}


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_learn_what_one_learns(outputs: dict[int, Path], run: str) -> None:
    one, two = (np.load(outputs[size] / run / "losses.npy") for size in (1, 2))
    assert len(one) == 20
    assert one[-1] < one[0] - 0.01  # it does learn
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=0)
    one, two = (np.load(outputs[size] / run / "scores.npy").astype(np.float64) for size in (1, 2))
    assert one.shape == (1500, 2)
    assert one.std(axis=0).min() > 1e-3
    logits = [np.log(scores / (1 - scores)) for scores in (one, two)]
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("run", [run for run in RUNS if run.endswith("-adagrad")])
def test_all_kinds_of_sharding_learn_the_same(outputs: dict[int, Path], run: str) -> None:
    reference = np.load(outputs[1] / "row_wise-adagrad" / "scores.npy")
    np.testing.assert_allclose(np.load(outputs[2] / run / "scores.npy"), reference, atol=1e-5, rtol=0)


def test_the_plan_is_the_one_that_was_asked_for(outputs: dict[int, Path]) -> None:
    for run in RUNS:
        kind = run.split("-")[0]
        plan = {table["table"]: table for table in json.loads((outputs[2] / run / "plan.json").read_text())}
        if kind != "mixed":
            assert set(plan) == {"user_id", "hour", "item_id", "tags", "price_bucket", "user_tag_cross", "last_two"}
        if kind not in ("auto", "mixed"):
            assert {table["sharding"] for table in plan.values()} == {kind}
    shards = {
        kind: [shard["size"] for shard in table["shards"]]
        for kind in ("row_wise", "column_wise")
        for table in json.loads((outputs[2] / f"{kind}-adagrad" / "plan.json").read_text())
        if table["table"] == "item_id"
    }
    assert shards == {"row_wise": [[106, 8], [105, 8]], "column_wise": [[211, 4], [211, 4]]}
    mixed = {table["table"]: table["sharding"] for table in json.loads((outputs[2] / "mixed/plan.json").read_text())}
    asked = {"item_id": "data_parallel", "last_two": "row_wise", "user_id": "column_wise", "tags": "table_wise"}
    wide = {"wide.user_id": "data_parallel", "wide.item_id": "data_parallel", "wide.tags": "data_parallel"}
    assert mixed.items() >= (asked | wide).items()
