"""The synthetic feed: deterministic bytes, true probabilities, histories that are what happened."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from torchrank.data import DataError
from torchrank.data.feed import auc, generate_feed

SIZES = {"users": 150, "items": 300, "days": 4, "rows_per_day": 20_000, "progress": False}


@pytest.fixture(scope="module")
def feed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("feed") / "set"
    return folder, generate_feed(folder, **SIZES, seed=3)


@pytest.fixture(scope="module")
def table(feed):
    """All days in order."""
    return pa.concat_tables(
        pq.read_table(path) for path in sorted(feed[0].glob("*/*.parquet"), key=lambda path: path.name)
    )


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_layout(feed):
    assert list(digests(feed[0])) == [
        "meta.json",
        "test/2025-01-04.parquet",
        "train/2025-01-01.parquet",
        "train/2025-01-02.parquet",
        "valid/2025-01-03.parquet",
    ]


def test_columns(table):
    assert {field.name: str(field.type) for field in table.schema} == {
        "request_id": "int64",
        "user_id": "string",
        "age": "int64",
        "gender": "string",
        "city": "string",
        "device": "string",
        "history_item": "list<element: string>",
        "history_category": "list<element: string>",
        "history_watch": "list<element: float>",
        "hour": "int64",
        "weekday": "int64",
        "network": "string",
        "timestamp": "int64",
        "item_id": "string",
        "category": "string",
        "tags": "list<element: string>",
        "author": "string",
        "duration": "float",
        "click": "int8",
        "finish": "int8",
        "p_click": "float",
        "p_finish": "float",
    }


def test_same_seed_same_bytes(feed, tmp_path):
    generate_feed(tmp_path / "again", **SIZES, seed=3)
    assert digests(tmp_path / "again") == digests(feed[0])
    generate_feed(tmp_path / "other", **SIZES, seed=4)
    assert digests(tmp_path / "other").keys() == digests(feed[0]).keys()
    assert not set(digests(tmp_path / "other").values()) & set(digests(feed[0]).values())


def test_meta_counts_what_was_written(feed):
    folder, meta = feed
    assert meta == {**json.loads((folder / "meta.json").read_text()), "created": True}
    for split in ("train", "valid", "test"):
        rows = pq.read_table(folder / split)
        assert meta["rows"][split] == rows.num_rows
        for task in ("click", "finish"):
            label, probability = rows[task].to_numpy(), rows[f"p_{task}"].to_numpy()
            assert meta["positive_share"][split][task] == pytest.approx(label.mean())
            assert meta["auc_best_reachable"][split][task] == pytest.approx(
                roc_auc_score(label, probability), abs=1e-12
            )


def test_requests(table):
    request = table["request_id"].to_numpy()
    starts = np.flatnonzero(np.diff(request, prepend=-1))
    assert np.array_equal(request[starts], np.arange(len(starts)))  # each once, together, counted through the days
    sizes = np.diff(starts, append=len(request))
    assert sizes.min() >= 1
    assert sizes.max() == 10
    assert 6 < sizes.mean() < 7.5
    assert np.all(np.diff(table["timestamp"].to_numpy()) >= 0)
    assert len(set(zip(request.tolist(), table["item_id"].to_pylist(), strict=True))) == len(request)
    inside = np.diff(request) == 0
    for name in ("user_id", "age", "gender", "city", "device", "history_item", "hour", "network", "timestamp"):
        values = table[name].to_pylist()
        assert all(a == b for a, b, same in zip(values, values[1:], inside, strict=False) if same), name


def test_finish_needs_a_click(table):
    click, finish = table["click"].to_numpy(), table["finish"].to_numpy()
    assert np.all(finish <= click)
    assert np.all(table["p_finish"].to_numpy() < table["p_click"].to_numpy())


@pytest.mark.parametrize("task", ["click", "finish"])
def test_probabilities_are_true(table, task):
    """Within each decile of the probability, the labels' mean is the probabilities' within 4.5 standard errors."""
    probability, label = table[f"p_{task}"].to_numpy().astype(np.float64), table[task].to_numpy()
    for rows in np.array_split(np.argsort(probability), 10):
        error = np.sqrt((probability[rows] * (1 - probability[rows])).sum()) / len(rows)
        assert abs(label[rows].mean() - probability[rows].mean()) < 4.5 * error


def test_history_is_what_was_finished_before(table):
    columns = {name: table[name].to_pylist() for name in table.column_names}
    category = dict(zip(columns["item_id"], columns["category"], strict=True))
    duration = dict(zip(columns["item_id"], columns["duration"], strict=True))
    starts = np.flatnonzero(np.diff(table["request_id"].to_numpy(), prepend=-1))
    finished: dict[str, list[str]] = {}
    checked = 0
    for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True):
        history = columns["history_item"][start]
        own = finished.setdefault(columns["user_id"][start], [])
        known = own[-20:]
        assert len(history) <= 20
        assert history[len(history) - len(known) :] == known  # oldest first; before those, what came before day one
        for item, kind, watch in zip(
            history, columns["history_category"][start], columns["history_watch"][start], strict=True
        ):
            if item in category:
                checked += 1
                assert category[item] == kind
                assert 0.99 <= watch / duration[item] <= 1.51
        own.extend(columns["item_id"][row] for row in range(start, end) if columns["finish"][row])
    assert checked > 10_000


def test_popularity_is_zipf(table):
    counts = np.sort(table["item_id"].value_counts().field("counts").to_numpy())[::-1]
    ranks = np.arange(1, 101)
    slope = np.polyfit(np.log(ranks), np.log(counts[:100]), 1)[0]
    assert -1.2 < slope < -0.5


def test_recent_categories_matter(table):
    """A candidate of the category finished last is clicked more than the others of the same request's user."""
    last = np.array([history[-1] if len(history) else "" for history in table["history_category"].to_pylist()])
    same = last == np.array(table["category"].to_pylist())
    click = table["click"].to_numpy()
    assert click[same].mean() > 1.3 * click[~same].mean()


def test_best_reachable_is_worth_reaching(feed):
    best = feed[1]["auc_best_reachable"]["train"]
    assert 0.72 < best["click"] < 0.87
    assert 0.75 < best["finish"] < 0.92


def test_same_parameters_are_already_there(feed):
    before = digests(feed[0])
    meta = generate_feed(feed[0], **SIZES, seed=3)
    assert meta == {**feed[1], "created": False}
    assert digests(feed[0]) == before


def test_other_parameters_are_refused(feed):
    before = digests(feed[0])
    with pytest.raises(DataError, match=r"found a feed with users=150 \(asked for 151\), seed=3 \(asked for 9\)"):
        generate_feed(feed[0], **{**SIZES, "users": 151}, seed=9)
    assert digests(feed[0]) == before


@pytest.mark.parametrize("name", ["note.txt", "meta.json"])
def test_a_folder_with_something_else_is_refused(tmp_path, name):
    (tmp_path / name).write_text("[]")
    with pytest.raises(DataError, match="something that is not a feed data set; accepted: a new or empty folder"):
        generate_feed(tmp_path, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_empty_folder_is_used(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    generate_feed(folder, users=5, items=20, days=3, rows_per_day=100, progress=False)
    assert (folder / "meta.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_nothing_is_left_of_a_generation_that_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(pq.ParquetWriter, "write_batch", fail)
    with pytest.raises(OSError, match="disk full"):
        generate_feed(tmp_path / "set", users=5, items=20, days=3, rows_per_day=100, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"), [("users", 1), ("items", 9), ("days", 2), ("rows_per_day", 99), ("seed", -1)]
)
def test_sizes_are_checked(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must be at least"):
        generate_feed(tmp_path / "set", **{"progress": False, name: value})


def test_auc_counts_ties_half():
    generator = np.random.default_rng(0)
    labels = generator.random(2000) < 0.3
    scores = (generator.integers(0, 20, 2000) / 20).astype(np.float32)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert auc(np.ones(3, bool), scores[:3]) is None
