"""Every kind of bad input is one error: file, column, what was found, what is accepted."""

import gzip
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrank.data import CsvSource, DataError, ParquetSource
from torchrank.data.columns import Columns

COLUMNS = Columns(types={"age": "int64"}, labels=("click",))


def check(source, columns, file, column, found, accepted):
    """Reads everything and expects this error."""
    with pytest.raises(DataError, match=re.escape(found)) as caught:
        list(source.stream(columns))
    error = caught.value
    assert (error.file, error.column) == (str(file), column)
    assert accepted in error.accepted
    message = str(error)
    assert str(file) in message
    assert "accepted: " in message
    assert column is None or repr(column) in message
    assert "\n" not in message


@pytest.fixture
def write(tmp_path):
    def write(table):
        path = tmp_path / "part.parquet"
        pq.write_table(pa.table(table), path, row_group_size=2)
        return path

    return write


def test_missing_column(write):
    path = write({"old": [1], "click": [1]})
    check(ParquetSource(str(path)), COLUMNS, path, "age", "no such column", "one of the file's: old, click")


@pytest.mark.parametrize(
    ("values", "wanted", "found", "accepted"),
    [
        (["1", "2"], "int64", "string", "any integer type"),
        ([1.5, 2.0], "int64", "double", "any integer type"),
        ([1, 2], "string", "int64", "string (plain, large or dictionary-encoded)"),
        (["x", "y"], "float32", "string", "any float, integer or decimal"),
        ([1, 2], "list<int64>", "int64", "a list of int64"),
        ([[1], [2]], "int64", "list<element: int64>", "any integer type"),
        ([["a"], ["b"]], "list<float32>", "list<element: string>", "a list of float32"),
        ([{"a": 1}, {"a": 2}], "string", "struct<a: int64>", "string"),
    ],
)
def test_wrong_type(write, values, wanted, found, accepted):
    path = write({"age": values})
    check(ParquetSource(str(path)), Columns(types={"age": wanted}), path, "age", found, accepted)


def test_value_that_does_not_fit(write):
    path = write({"age": pa.array([1, 2**63], pa.uint64())})
    check(ParquetSource(str(path)), Columns(types={"age": "int64"}), path, "age", "9223372036854775808", "int64")


@pytest.mark.parametrize("bad", [2, -1, 0.5, None, float("nan"), 2**53 + 1])
def test_label_outside_0_and_1(write, bad):
    path = write({"age": [1, 2, 3, 4, 5], "click": [0, 1, 1, bad, 0]})
    check(ParquetSource(str(path)), COLUMNS, path, "click", f"{bad} in row 3", "0 or 1")


def test_label_of_a_wrong_type(write):
    path = write({"age": [1], "click": ["yes"]})
    check(ParquetSource(str(path)), COLUMNS, path, "click", "string", "0 or 1")


def test_empty_folder(tmp_path):
    (tmp_path / "note.txt").write_text("")
    check(
        ParquetSource(str(tmp_path)),
        COLUMNS,
        tmp_path,
        None,
        "no *.parquet file in the folder",
        "a folder with *.parquet",
    )


def test_nothing_there(tmp_path):
    path = tmp_path / "none"
    check(ParquetSource(str(path)), COLUMNS, path, None, "nothing there", "a file")


def test_glob_without_match(tmp_path):
    path = tmp_path / "*.csv"
    check(CsvSource(str(path)), COLUMNS, path, None, "no file that matches", "a glob that matches some")


def test_unknown_scheme():
    check(ParquetSource("nowhere://x"), COLUMNS, "nowhere://x", None, "nowhere", "fsspec URL")


def test_no_rows(write):
    path = write({"age": pa.array([], pa.int64()), "click": pa.array([], pa.int64())})
    check(ParquetSource(str(path)), COLUMNS, path, None, "0 rows", "at least one row")


def test_corrupt_parquet_footer(write):
    path = write({"age": [1], "click": [1]})
    path.write_bytes(path.read_bytes()[:-9])
    check(ParquetSource(str(path)), COLUMNS, path, None, "no readable footer", "a complete Parquet file")


def test_corrupt_parquet_pages(write):
    path = write({"age": list(range(1000)), "click": [1] * 1000})
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    check(ParquetSource(str(path)), COLUMNS, path, None, "row group 0 that cannot be read", "a complete Parquet file")


class TestCsvErrors:
    @pytest.fixture
    def source(self, tmp_path):
        def source(text, **options):
            path = tmp_path / "part.csv"
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            return CsvSource(str(path), **options), path

        return source

    def test_missing_column(self, source):
        found, path = source("old,click\n1,1\n")
        check(found, COLUMNS, path, "age", "no such column", "old, click")

    def test_text_where_a_number_belongs(self, source):
        found, path = source("age,click\n1,1\nmany,0\n")
        check(
            found, COLUMNS, path, None, "column 'age': CSV conversion error to int64: invalid value 'many'", "numbers"
        )

    def test_too_few_values(self, source):
        found, path = source("age,click\n1,1\n2\n")
        check(found, COLUMNS, path, None, "Expected 2 columns, got 1", "equally many values")

    def test_label(self, source):
        found, path = source("age,click\n1,1\n1,3\n")
        check(found, COLUMNS, path, "click", "3.0 in row 1", "0 or 1")

    def test_list_element(self, source):
        found, path = source("ids\n1|x\n")
        check(found, Columns(types={"ids": "list<int64>"}), path, "ids", "'x'", "list<int64>")

    def test_gzip(self, source):
        found, path = source(gzip.compress(b"age,click\n1,1\n"))
        check(found, COLUMNS, path, None, "a gzip file", "uncompressed")

    @pytest.mark.parametrize("text", ["", "\n\n"])
    def test_no_header(self, source, text):
        found, path = source(text)
        check(found, COLUMNS, path, None, "no header line", "names the columns")

    def test_no_rows(self, source):
        found, path = source("age,click\n")
        check(found, COLUMNS, path, None, "0 rows", "at least one row")

    def test_not_utf8(self, source):
        found, path = source(b"name\n\xff\xfe\n")
        check(found, Columns(types={"name": "string"}), path, None, "invalid UTF8", "UTF-8")
