"""Census-Income: UCI's lines become typed columns and two tasks."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from torchrank.data import DataError
from torchrank.data.census import AMOUNTS, CODES, COLUMNS, write_census

LINE = (
    "{age}, Private, 4, 34, Some college but no degree, 120, Not in universe, {marital}, Construction, Sales, White, "
    "NA, Male, Not in universe, Not in universe, Full-time schedules, 10, 20, 30, Single, ?, Arkansas, Householder, "
    "Householder, 1053.55, MSA to MSA, Same county, Same county, No, Yes, 6, Not in universe, United-States, Cuba, "
    "Hong Kong, Foreign born- Not a citizen of U S , 2, Not in universe, 1, 52, 94, {income}\n"
)
INCOMES, MARITAL = (" - 50000.", " 50000+."), ("Divorced", "Never married")


def lines(generator, count):
    """`count` lines whose age is the number of the line, and the labels (income, never married)."""
    labels = generator.integers(0, 2, (count, 2))
    text = "".join(
        LINE.format(age=age, income=INCOMES[income].strip(), marital=MARITAL[never])
        for age, (income, never) in enumerate(labels.tolist())
    )
    return text, labels


@pytest.fixture
def source(tmp_path):
    """An excerpt: a plain training file of 50 lines, a gzipped test file of 31."""
    folder = tmp_path / "uci"
    folder.mkdir()
    generator = np.random.default_rng(0)
    train, train_labels = lines(generator, 50)
    test, test_labels = lines(generator, 31)
    (folder / "census-income.data").write_text(train)
    (folder / "census-income.test.gz").write_bytes(gzip.compress(test.encode()))
    return folder, train_labels, test_labels


def read(folder, split):
    return pq.read_table(folder / split)


def labels_of(table):
    return np.stack([table["income"].to_numpy(), table["never_married"].to_numpy()], axis=1)


def test_columns_and_values(source, tmp_path):
    folder, train_labels, _ = source
    assert write_census(folder, tmp_path / "out", partial=True) == {"train": 50, "valid": 15, "test": 16}
    table = read(tmp_path / "out", "train")
    inputs = [name for name in COLUMNS if name not in ("marital_status", "instance_weight", "income")]
    assert table.column_names == [*inputs, "income", "never_married"]
    assert len(inputs) == 39
    assert len(AMOUNTS) == 7
    for name in inputs:
        expected = "float" if name in AMOUNTS else "int64" if name in CODES else "string"
        assert str(table.schema.field(name).type) == expected, name
    assert table["age"].to_pylist() == list(range(50))
    assert np.array_equal(labels_of(table), train_labels)
    row = table.slice(7, 1).to_pylist()[0]
    assert row["hispanic_origin"] == "NA"
    assert row["previous_region"] == "?"
    assert row["citizenship"] == "Foreign born- Not a citizen of U S"
    assert (row["industry_code"], row["occupation_code"], row["year"]) == (4, 34, 94)
    assert [row[name] for name in AMOUNTS] == [7.0, 120.0, 10.0, 20.0, 30.0, 6.0, 52.0]


def test_the_test_file_is_halved_by_seed(source, tmp_path):
    folder, _, test_labels = source
    halves = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_census(folder, tmp_path / name, seed, partial=True)
        valid, test = read(tmp_path / name, "valid"), read(tmp_path / name, "test")
        ages = valid["age"].to_pylist(), test["age"].to_pylist()
        assert sorted(ages[0] + ages[1]) == list(range(31))
        for part, rows in zip((valid, test), ages, strict=True):
            assert np.array_equal(labels_of(part), test_labels[np.array(rows, dtype=int)])
        halves[name] = ages
    assert halves["a"] == halves["b"] != halves["c"]


def test_incomplete_files_are_refused(source, tmp_path):
    with pytest.raises(
        DataError, match=r"census-income.data: found 50 rows, .*accepted: UCI's 199523, 12382 and 86485"
    ):
        write_census(source[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"neither census-income.data nor census-income.data.gz"):
        write_census(tmp_path, tmp_path / "out", partial=True)


def test_output_with_something_in_it(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("")
    with pytest.raises(DataError, match="something that is there already; accepted: a new or empty folder"):
        write_census(source[0], tmp_path / "out", partial=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("50000+.", "60000+.", r"column 'income': found '60000\+\.'; accepted: '- 50000\.' or '50000\+\.'"),
        (", 52, 94", ", fifty, 94", "column 'weeks_worked': found .*fifty.*; accepted: numbers"),
        ("Private, 4, 34", "Private, 4.5, 34", "column 'industry_code': found .*4.5.*; accepted: numbers"),
        (", Male", "", "Expected 42 columns, got 41.*accepted: lines of 42 values"),
    ],
)
def test_damaged_lines(source, tmp_path, old, new, message):
    path = source[0] / "census-income.data"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        write_census(source[0], tmp_path / "out", partial=True)


def test_cut_gzip(source, tmp_path):
    path = source[0] / "census-income.test.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="a file that cannot be unpacked"):
        write_census(source[0], tmp_path / "out", partial=True)


def test_vocabularies_have_no_marital_status():
    text = (Path(__file__).parents[2] / "conf/features/census.yaml").read_text()
    assert "marital" not in text
    assert "weight" not in text
