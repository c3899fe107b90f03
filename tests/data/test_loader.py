"""Loader: batches of exact size, resumable by rows, made in a thread that never outlives its reader."""

import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrank.data import DataError, Loader, ParquetSource
from torchrank.features.spec import load_feature_spec
from torchrank.features.transform import FeatureTransform

SPEC = load_feature_spec(
    {
        "columns": {
            "user": {"side": "user", "type": "int64"},
            "item": {"side": "item", "type": "int64"},
            "price": {"side": "item", "type": "float32"},
        },
        "features": [
            {"name": "user", "op": "id", "inputs": ["user"], "num_embeddings": 1000},
            {"name": "item", "op": "id", "inputs": ["item"], "num_embeddings": 1000},
            {"name": "price", "op": "raw", "inputs": ["price"]},
        ],
    }
)
ROWS = 333


@pytest.fixture
def source(tmp_path):
    """Requests of three rows, of one user each; the item is the row's number."""
    generator = np.random.default_rng(0)
    table = pa.table(
        {
            "row": np.arange(ROWS),
            "request": np.arange(ROWS) // 3,
            "user": np.arange(ROWS) // 3,
            "item": np.arange(ROWS),
            "price": generator.normal(size=ROWS),
            "click": generator.integers(0, 2, ROWS),
            "finish": generator.integers(0, 2, ROWS).astype(bool),
            "text": pa.array([f"t{i}" for i in range(ROWS)]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=50)
    return ParquetSource(str(tmp_path)), table


def loader(source, batch_size, **options):
    return Loader(source, FeatureTransform(SPEC), ["click", "finish"], batch_size, **options)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "torchrank-loader"]


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64, 333, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_the_rows(source, batch_size, shuffle):
    source, table = source
    batches = list(loader(source, batch_size, shuffle=shuffle, keep=["row", "text"]).epoch(0))
    sizes = [batch.rows for batch in batches]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert sum(sizes) == ROWS
    assert [batch.rows_read for batch in batches] == np.cumsum(sizes).tolist()
    for batch in batches:
        row = batch.columns.column("row").to_numpy()
        assert batch.columns.schema.names == ["row", "text"]
        assert batch.columns.column("text").to_pylist() == [f"t{i}" for i in row]
        assert np.array_equal(batch.features.item.sparse["item"].values, row)
        assert np.array_equal(batch.features.item.dense[:, 0], table["price"].to_numpy()[row].astype(np.float32))
        for task in ("click", "finish"):
            assert batch.labels[task].dtype == np.float32
            assert batch.labels[task].flags.writeable
            assert np.array_equal(batch.labels[task], table[task].to_numpy()[row].astype(np.float32))
    seen = np.concatenate([batch.columns.column("row").to_numpy() for batch in batches])
    assert sorted(seen) == list(range(ROWS))
    assert (seen.tolist() == list(range(ROWS))) is not shuffle


@pytest.mark.parametrize("shuffle", [False, True])
def test_requests_share_their_user_row(source, shuffle):
    source, _ = source
    for batch in loader(source, 50, request_column="request", shuffle=shuffle, keep=["row"]).epoch(1):
        user = batch.features.user.sparse["user"].values[batch.features.user_index]
        assert np.array_equal(user, batch.columns.column("row").to_numpy() // 3)
        # 50 rows: 17 requests, one more where a batch or a row group (50 rows) begins and ends within one
        assert batch.features.user.rows <= 50 // 3 + 3


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_rows_read_resumes_exactly(source, shards):
    source, _ = source
    for shard in range(shards):
        whole = loader(source, 16, shard=shard, shards=shards, shuffle=True, request_column="request", keep=["row"])
        batches = list(whole.epoch(2))
        for done in (1, 4, len(batches)):
            rest = list(whole.epoch(2, skip=batches[done - 1].rows_read))
            expected = [batch.columns.column("row").to_pylist() for batch in batches[done:]]
            assert [batch.columns.column("row").to_pylist() for batch in rest] == expected
            assert [batch.rows_read for batch in rest] == [batch.rows_read for batch in batches[done:]]


@pytest.mark.parametrize(("shards", "batch_size"), [(1, 10), (2, 83), (3, 37), (5, 67), (400, 10)])
def test_counts(source, shards, batch_size):
    source, _ = source
    loaders = [loader(source, batch_size, shard=shard, shards=shards) for shard in range(shards)]
    counted = [list(one.epoch(0)) for one in loaders[:6]]
    assert sum(one.rows for one in loaders) == ROWS
    assert [one.batches for one in loaders[:6]] == [len(batches) for batches in counted]
    assert loaders[0].common_batches == min(one.batches for one in loaders)
    assert max(one.batches for one in loaders) - loaders[0].common_batches <= 1


def test_only_what_is_needed_is_read(source, monkeypatch):
    source, _ = source
    asked = set()
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, **keys: asked.update(keys["columns"]) or original(self, i, **keys),
    )
    list(loader(source, 50).epoch(0))
    assert asked == {"user", "item", "price", "click", "finish"}


def test_no_labels_for_prediction(source):
    source, _ = source
    batch = next(Loader(source, FeatureTransform(SPEC), [], 10, keep=["click"]).epoch(0))
    assert batch.labels == {}
    assert batch.columns.schema.field("click").type == pa.int64()


def test_errors_reach_the_reader(tmp_path):
    pq.write_table(
        pa.table({"user": [1, 2], "item": [1, 2], "price": [1.0, 2.0], "click": [0, 1], "finish": [0, 7]}),
        tmp_path / "x.parquet",
    )
    batches = loader(ParquetSource(str(tmp_path)), 1).epoch(0)
    with pytest.raises(DataError, match="column 'finish': found 7 in row 1"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_a_missing_folder_reaches_the_reader(tmp_path):
    with pytest.raises(DataError, match="nothing there"):
        list(loader(ParquetSource(str(tmp_path / "none")), 1).epoch(0))


def test_a_reader_that_stops_early_leaves_no_thread(source):
    source, _ = source
    for stop in (1, 2, 5):
        batches = loader(source, 5).epoch(0)
        for _ in range(stop):
            next(batches)
        batches.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "torchrank-loader"]
    for batch in loader(source, 5).epoch(0):
        assert batch.rows == 5
        break


def test_at_most_prefetch_batches_are_made_ahead(source):
    source, _ = source
    made = []

    class Counting(FeatureTransform):
        def from_arrow(self, batch, *, request_column=None):
            made.append(batch.num_rows)
            return super().from_arrow(batch, request_column=request_column)

    batches = Loader(source, Counting(SPEC), ["click"], 10, prefetch=3).epoch(0)
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # one taken, three ahead
    batches.close()


def test_a_label_that_is_an_input_is_an_error(source):
    source, _ = source
    with pytest.raises(ValueError, match=r"columns \['price'\] are labels and inputs"):
        Loader(source, FeatureTransform(SPEC), ["price"], 10)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 1, "prefetch": 0}])
def test_sizes_are_checked(source, wrong):
    source, _ = source
    with pytest.raises(ValueError, match="must be at least 1"):
        loader(source, **wrong)
