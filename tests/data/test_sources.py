"""The contract of sources, on Parquet and CSV alike: every row once, in an order that seed and epoch name."""

from itertools import chain, pairwise

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from torchrank.data import CsvSource, ParquetSource
from torchrank.data.columns import Columns
from torchrank.data.source import Order

COLUMNS = Columns(
    types={"name": "string", "age": "int64", "price": "float32"}, labels=("click",), keep=("row", "request")
)


def make_rows(generator, count):
    """Rows with their number, and requests of 1 to 6 neighbouring rows."""
    request = np.repeat(np.arange(count), generator.integers(1, 7, count))[:count]
    return pa.table(
        {
            "row": np.arange(count),
            "unused": generator.normal(size=count),
            "request": request,
            "name": pa.array([f"näme {i}" for i in generator.integers(0, 50, count)]),
            "age": generator.integers(-5, 99, count),
            "price": pa.array(generator.normal(size=count).astype(np.float32), mask=generator.random(count) < 0.2),
            "click": generator.integers(0, 2, count).astype(np.int8),
        }
    )


def write_parquet(folder, parts):
    for number, part in enumerate(parts):
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=37)


def write_csv(folder, parts):
    for number, part in enumerate(parts):
        pyarrow.csv.write_csv(part, folder / f"part-{number}.csv")


@pytest.fixture(params=["parquet", "csv"])
def make_source(request, tmp_path):
    """Writes a table as three files of different sizes (the second may be empty) and opens the folder."""

    def make(table, cuts=(0.2, 0.7)):
        first, second = (int(table.num_rows * cut) for cut in cuts)
        parts = [table.slice(0, first), table.slice(first, second - first), table.slice(second)]
        if request.param == "parquet":
            write_parquet(tmp_path, parts)
            return ParquetSource(str(tmp_path))
        write_csv(tmp_path, parts)
        return CsvSource(str(tmp_path), block_bytes=700)

    return make


@pytest.fixture
def seed():
    seed = np.random.SeedSequence().entropy % 2**32
    print("seed", seed)  # shown when a test fails
    return seed


def read(source, order=None, skip=0):
    batches = list(source.stream(COLUMNS, order, skip=skip))
    return pa.Table.from_batches(batches) if batches else None


def rows_of(source, order=None, skip=0):
    table = read(source, order, skip)
    return [] if table is None else [int(row) for row in table["row"].to_pylist()]


class TestEverySource:
    def test_values_are_those_written(self, make_source, seed):
        table = make_rows(np.random.default_rng(seed), 500)
        found = read(make_source(table))
        for name in ("name", "age", "price"):
            assert found[name].to_pylist() == table[name].to_pylist()
        assert found["click"].to_pylist() == [float(x) for x in table["click"].to_pylist()]
        assert found.column_names == ["name", "age", "price", "click", "row", "request"]
        assert [str(found[name].type) for name in ("name", "age", "price", "click")] == [
            "string",
            "int64",
            "float",
            "float",
        ]

    @pytest.mark.parametrize("shards", [1, 2, 3, 7])
    @pytest.mark.parametrize("shuffle", [False, True])
    @pytest.mark.parametrize("request_column", [None, "request"])
    def test_every_row_is_read_once(self, make_source, seed, shards, shuffle, request_column):
        source = make_source(make_rows(np.random.default_rng(seed), 500))
        orders = [Order(s, shards, 3, shuffle=shuffle, request_column=request_column) for s in range(shards)]
        parts = [rows_of(source, order) for order in orders]
        assert sorted(chain(*parts)) == list(range(500))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_fewer_rows_than_shards(self, make_source):
        source = make_source(make_rows(np.random.default_rng(0), 2), cuts=(0.5, 0.5))
        parts = [rows_of(source, Order(shard, 5)) for shard in range(5)]
        assert list(chain(*parts)) == [0, 1]
        assert sorted(map(len, parts)) == [0, 0, 0, 1, 1]

    def test_shards_cut_one_and_the_same_order(self, make_source, seed):
        source = make_source(make_rows(np.random.default_rng(seed), 301))
        whole = rows_of(source, Order(seed=4, epoch=2, shuffle=True, request_column="request"))
        for shards in (2, 3):
            orders = [Order(s, shards, 4, 2, shuffle=True, request_column="request") for s in range(shards)]
            assert list(chain(*(rows_of(source, order) for order in orders))) == whole

    def test_unshuffled_is_file_order(self, make_source, seed):
        source = make_source(make_rows(np.random.default_rng(seed), 123))
        assert rows_of(source, Order(seed=9, epoch=5)) == list(range(123))

    def test_shuffle_depends_on_seed_and_epoch_only(self, make_source, seed):
        source = make_source(make_rows(np.random.default_rng(seed), 400))
        first = rows_of(source, Order(seed=1, epoch=1, shuffle=True))
        assert rows_of(source, Order(seed=1, epoch=1, shuffle=True)) == first
        others = [Order(seed=1, epoch=0, shuffle=True), Order(seed=2, epoch=1, shuffle=True), Order(seed=1, epoch=1)]
        assert all(rows_of(source, order) != first for order in others)
        # far from file order: neighbours in the result are hardly ever neighbours in the file
        assert np.mean(np.diff(first) == 1) < 0.1

    def test_shuffle_keeps_requests_together(self, make_source, seed):
        table = make_rows(np.random.default_rng(seed), 400)
        source = make_source(table)
        found = rows_of(source, Order(seed=1, shuffle=True, request_column="request"))
        request = table["request"].to_numpy()
        pieces = np.concatenate([[number] * piece.rows for number, piece in enumerate(source.pieces)])
        run_of = dict(enumerate(zip(pieces.tolist(), request.tolist(), strict=True)))
        runs = [run_of[row] for row in found]
        changes = 1 + sum(a != b for a, b in pairwise(runs))
        assert changes == len(set(runs))
        assert all(b == a + 1 for a, b in pairwise(found) if run_of[a] == run_of[b])

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_skip_goes_on_where_it_was(self, make_source, seed, shuffle):
        source = make_source(make_rows(np.random.default_rng(seed), 211))
        for shard in range(2):
            order = Order(shard, 2, 5, 1, shuffle=shuffle, request_column="request")
            whole = rows_of(source, order)
            for skip in (0, 1, 36, 37, 38, 100, len(whole)):
                assert rows_of(source, order, skip) == whole[skip:]

    def test_skip_beyond_the_shard_is_an_error(self, make_source):
        source = make_source(make_rows(np.random.default_rng(0), 10))
        with pytest.raises(ValueError, match="skip 11: this shard has 10 rows"):
            rows_of(source, skip=11)

    def test_wrong_shard_is_an_error(self, make_source):
        source = make_source(make_rows(np.random.default_rng(0), 10))
        with pytest.raises(ValueError, match=r"shard 2 of 2: accepted are 0 … 1"):
            rows_of(source, Order(2, 2))

    def test_column_names(self, make_source):
        table = make_rows(np.random.default_rng(0), 10)
        assert make_source(table).column_names() == table.column_names


def test_skipped_and_foreign_row_groups_are_not_read(tmp_path, monkeypatch):
    write_parquet(tmp_path, [make_rows(np.random.default_rng(0), 370)])
    source = ParquetSource(str(tmp_path))
    asked = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, **keys: asked.append((i, keys["columns"])) or original(self, i, **keys),
    )
    assert len(rows_of(source, Order(1, 2), skip=40)) == 145
    assert [index for index, _ in asked] == [6, 7, 8, 9]
    assert asked[0][1] == COLUMNS.names


class TestPaths:
    @pytest.fixture
    def folder(self, tmp_path):
        """Two data files, and three things that are none."""
        table = make_rows(np.random.default_rng(0), 60)
        (tmp_path / "day=2").mkdir()
        pq.write_table(table.slice(0, 20), tmp_path / "a.parquet")
        pq.write_table(table.slice(20), tmp_path / "day=2" / "b.parquet")
        (tmp_path / "_SUCCESS").write_text("")
        (tmp_path / "meta.json").write_text("{}")
        (tmp_path / ".a.parquet.tmp").write_text("half")
        (tmp_path / "_temporary").mkdir()
        (tmp_path / "_temporary" / "c.parquet").write_text("half")
        return tmp_path

    def test_folder_and_the_folders_in_it(self, folder):
        assert rows_of(ParquetSource(str(folder))) == list(range(60))

    def test_file(self, folder):
        assert rows_of(ParquetSource(str(folder / "a.parquet"))) == list(range(20))

    def test_glob(self, folder):
        assert rows_of(ParquetSource(f"{folder}/*.parquet")) == list(range(20))
        assert rows_of(ParquetSource(f"{folder}/day=*/*.parquet")) == list(range(20, 60))

    def test_url_with_scheme_file(self, folder):
        assert rows_of(ParquetSource(f"file://{folder}/a.parquet")) == list(range(20))

    @pytest.mark.parametrize("suffix", ["parquet", "csv"])
    def test_memory_file_system(self, suffix, tmp_path):
        table = make_rows(np.random.default_rng(0), 60)
        files = fsspec.filesystem("memory")
        root = f"/{tmp_path.name}-{suffix}"
        writer, source = (pq.write_table, ParquetSource) if suffix == "parquet" else (pyarrow.csv.write_csv, CsvSource)
        with files.open(f"{root}/one.{suffix}", "wb") as file:
            writer(table, file)
        try:
            assert rows_of(source(f"memory:/{root}")) == list(range(60))
            assert rows_of(source(f"memory:/{root}/*.{suffix}")) == list(range(60))
        finally:
            files.rm(root, recursive=True)


class TestCsv:
    def test_list_columns(self, tmp_path):
        (tmp_path / "x.csv").write_text("tags,ids,n\na|b,1|2,1\n,,2\nc,7,3\n")
        columns = Columns(types={"tags": "list<string>", "ids": "list<int64>"}, keep=("n",))
        table = pa.Table.from_batches(list(CsvSource(str(tmp_path)).stream(columns)))
        assert table["tags"].to_pylist() == [["a", "b"], [], ["c"]]
        assert table["ids"].to_pylist() == [[1, 2], [], [7]]
        assert table["n"].to_pylist() == ["1", "2", "3"]

    def test_without_header_other_delimiter_blank_lines_and_no_last_newline(self, tmp_path):
        (tmp_path / "x.tsv").write_bytes(b"1\tNA\r\n\r\n2\t\r\n\n3\tc")
        source = CsvSource(str(tmp_path / "x.tsv"), delimiter="\t", column_names=["n", "s"])
        assert source.rows == 3
        columns = Columns(types={"n": "int64", "s": "string"})
        table = pa.Table.from_batches(list(source.stream(columns)))
        assert table.to_pydict() == {"n": [1, 2, 3], "s": ["NA", "", "c"]}

    def test_any_block_size_gives_the_same_rows(self, tmp_path):
        table = make_rows(np.random.default_rng(0), 50)
        pyarrow.csv.write_csv(table, tmp_path / "x.csv")
        for block_bytes in (1, 2, 63, 64, 65, 1000, 10**6):
            source = CsvSource(str(tmp_path), block_bytes=block_bytes)
            assert rows_of(source) == list(range(50))
            assert (len(source.pieces) == 1) == (block_bytes == 10**6)


def test_types_that_widen(tmp_path):
    table = pa.table(
        {
            "name": pa.array(["a", None, "b"]).dictionary_encode(),
            "age": pa.array([1, None, 3], pa.uint8()),
            "price": pa.array([2**24 + 1, 2, None], pa.int64()),
            "click": pa.array([True, False, True]),
            "tags": pa.array([["x"], None, []], pa.large_list(pa.large_string())),
            "nothing": pa.nulls(3),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    columns = Columns(
        types={"name": "string", "age": "int64", "price": "float32", "tags": "list<string>", "nothing": "list<int64>"},
        labels=("click",),
    )
    (batch,) = ParquetSource(str(tmp_path)).stream(columns)
    assert batch.to_pydict() == {
        "name": ["a", None, "b"],
        "age": [1, None, 3],
        "price": [float(2**24), 2.0, None],
        "tags": [["x"], None, []],
        "nothing": [None, None, None],
        "click": [1.0, 0.0, 1.0],
    }
    assert batch.schema.field("tags").type == pa.list_(pa.string())
