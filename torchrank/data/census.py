"""UCI Census-Income (KDD) as Parquet: the multi-task benchmark of the MMoE paper (Ma et al., KDD 2018).

    DIR/train/census.parquet    UCI's training file
    DIR/valid/…, DIR/test/…     the seeded halves of UCI's test file, each in UCI's order

Tasks: `income` (above 50,000) and `never_married`. Marital status, which the second task is made of, and the instance
weight are not written. 39 columns remain, as in Torch-RecHub's protocol: 7 amounts and 32 categories.
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from torchrank.data.errors import DataError
from torchrank.data.new_folder import is_free, new_folder

# UCI's order. `?` and `Not in universe` are values like others.
COLUMNS = (
    "age", "class_of_worker", "industry_code", "occupation_code", "education", "wage_per_hour", "enrolled_in_education",
    "marital_status", "major_industry", "major_occupation", "race", "hispanic_origin", "sex", "labor_union_member",
    "unemployment_reason", "employment_status", "capital_gains", "capital_losses", "stock_dividends",
    "tax_filer_status", "previous_region", "previous_state", "household_status", "household_summary", "instance_weight",
    "migration_msa", "migration_region", "migration_within_region", "same_house_1_year_ago", "migration_sunbelt",
    "employer_size", "parents_present", "father_birth_country", "mother_birth_country", "birth_country", "citizenship",
    "self_employed", "veterans_questionnaire", "veterans_benefits", "weeks_worked", "year", "income",
)  # fmt: skip
AMOUNTS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "stock_dividends",
    "employer_size",
    "weeks_worked",
)
CODES = ("industry_code", "occupation_code", "self_employed", "veterans_benefits", "year")  # numbers that name classes
NEVER_INPUTS = ("marital_status", "instance_weight", "income")
TASKS = ("income", "never_married")
_INCOME = ("- 50000.", "50000+.")
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Expected:
    """A complete UCI file."""

    rows: int
    income: int
    never_married: int


FULL = {"data": Expected(199_523, 12_382, 86_485), "test": Expected(99_762, 6_186, 43_143)}


def write_census(source: Path, output: Path, seed: int = 0, *, partial: bool = False) -> dict[str, int]:
    """Reads `census-income.data` and `census-income.test` (or the same with .gz) in `source`; returns rows per split.

    Raises DataError for a missing or damaged file, for one whose number of rows or positive labels is not UCI's
    (unless `partial`: excerpts), and for an output folder that is not empty.
    """
    if not is_free(output):
        raise DataError(str(output), found="something that is there already", accepted="a new or empty folder")
    train = _read(source, "data", partial)
    held_out = _read(source, "test", partial)
    order = np.random.default_rng(seed).permutation(held_out.num_rows)
    half = held_out.num_rows // 2
    tables = (train, held_out.take(np.sort(order[:half])), held_out.take(np.sort(order[half:])))
    with new_folder(output) as folder:
        for split, table in zip(_SPLITS, tables, strict=True):
            (folder / split).mkdir()
            path = folder / split / "census.parquet"
            pq.write_table(table, path, compression="zstd", row_group_size=32_768, store_schema=False)
    return {split: table.num_rows for split, table in zip(_SPLITS, tables, strict=True)}


def _read(source: Path, part: str, partial: bool) -> pa.Table:
    plain = source / f"census-income.{part}"
    packed = source / f"census-income.{part}.gz"
    path = plain if plain.exists() else packed
    if not path.exists():
        raise DataError(str(source), found=f"neither {plain.name} nor {packed.name}", accepted="UCI's two files")
    try:
        text = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError) as error:  # BadGzipFile is an OSError, a cut file an EOFError
        raise DataError(str(path), found=f"a file that cannot be unpacked ({error})", accepted="gzip") from error
    table = _parse(path, text)
    if not partial:
        _check_complete(path, table, FULL[part])
    return table


def _parse(path: Path, text: bytes) -> pa.Table:
    try:
        raw = pyarrow.csv.read_csv(
            io.BytesIO(text),
            read_options=pyarrow.csv.ReadOptions(column_names=list(COLUMNS)),
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in COLUMNS}),
        )
    except pa.ArrowInvalid as error:
        raise DataError(str(path), found=str(error), accepted=f"lines of {len(COLUMNS)} values") from error
    columns = {name: _typed(path, name, pc.utf8_trim_whitespace(raw.column(name))) for name in COLUMNS}
    columns["never_married"] = pc.equal(columns["marital_status"], "Never married").cast(pa.int8())
    inputs = [name for name in COLUMNS if name not in NEVER_INPUTS]
    return pa.table({name: columns[name] for name in [*inputs, *TASKS]}).combine_chunks()


def _typed(path: Path, name: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    if name == "income":
        return _income(path, values)
    if name not in AMOUNTS and name not in CODES:
        return values
    try:
        return pc.cast(values, pa.float32() if name in AMOUNTS else pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(str(path), column=name, found=str(error), accepted="numbers") from error


def _income(path: Path, values: pa.ChunkedArray) -> pa.ChunkedArray:
    known = pa.array(_INCOME)
    unknown = pc.filter(values, pc.invert(pc.is_in(values, known)))
    if len(unknown):
        raise DataError(
            str(path), column="income", found=repr(unknown[0].as_py()), accepted=" or ".join(map(repr, _INCOME))
        )
    return pc.equal(values, _INCOME[1]).cast(pa.int8())


def _check_complete(path: Path, table: pa.Table, expected: Expected) -> None:
    found = Expected(table.num_rows, *(pc.sum(table.column(task)).as_py() for task in TASKS))
    if found != expected:
        raise DataError(
            str(path),
            found=f"{found.rows} rows, {found.income} with income, {found.never_married} never married",
            accepted=f"UCI's {expected.rows}, {expected.income} and {expected.never_married}",
        )
