"""Checks of stored rows, against plain integers, and what they notice."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.release import TableInfo
from embedding_store.row_checks import row_checks, seed_of, table_seed, with_checks
from tests.embedding_store import check_reference

WIDTHS = [*range(1, 70), 127, 128, 130, 260, 1000, 12_000]
IDS = np.array([0, 1, -1, 2**63 - 1, -(2**63), 77, 2**32, -5], np.int64)
SEED = seed_of("item", "fp32", 32)
TRIES = 200_000


def random_rows(n: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, width), np.uint8)


def passed(checks: NDArray[np.uint16], others: NDArray[np.uint16]) -> bool:
    """No more than 2^-16 of them, as far as so few tell: 3 are expected of 200,000."""
    return int(np.count_nonzero(checks == others)) <= 16


@pytest.mark.parametrize("width", WIDTHS)
def test_checks_are_what_integers_give(width: int) -> None:
    rows = random_rows(len(IDS), width, seed=width)
    rows[2], rows[3] = 0, 255
    table = TableInfo("a.b+c", 8, width, "int8", width, 1, "")
    stored = with_checks(table_seed(table), IDS, rows)
    expected = [check_reference.stored(table, int(key), row.tobytes()) for key, row in zip(IDS, rows, strict=True)]
    assert [row.tobytes() for row in stored] == expected


def test_rows_that_lie_apart_in_memory_have_the_same_checks() -> None:
    rows = random_rows(8, 64)
    expected = row_checks(SEED, IDS, np.ascontiguousarray(rows[:, 5:30]))
    assert row_checks(SEED, IDS, rows[:, 5:30]).tolist() == expected.tolist()
    fixed = np.frombuffer(rows.tobytes(), np.uint8).reshape(8, 64)  # which nobody may write
    assert row_checks(SEED, IDS, fixed).tolist() == row_checks(SEED, IDS, rows).tolist()


@pytest.mark.parametrize("width", [4, 14, 16, 32, 128])
def test_other_bytes_ids_and_tables_have_other_checks(width: int) -> None:
    rows, ids = random_rows(TRIES, width), np.arange(TRIES)
    checks = row_checks(SEED, ids, rows)
    assert passed(checks, row_checks(SEED, ids, random_rows(TRIES, width, seed=1)))
    assert passed(checks, row_checks(SEED, ids + 1, rows))
    assert passed(checks, np.roll(checks, 1))
    for other in (seed_of("item2", "fp32", 32), seed_of("item", "fp16", 32), seed_of("item", "fp32", 64)):
        assert passed(checks, row_checks(other, ids, rows))
    noise = np.random.default_rng(2).integers(0, 2**16, TRIES).astype(np.uint16)
    assert passed(checks, noise)
    same = np.broadcast_to(rows[:1], rows.shape)  # one row for all ids
    assert passed(row_checks(SEED, ids, same), np.roll(row_checks(SEED, ids, same), 1))


def test_zeros_never_pass() -> None:
    """A block of a file that was never written reads as such; 0 is no row's check."""
    for width in (1, 8, 32, 130):
        assert row_checks(SEED, np.arange(TRIES), np.zeros((TRIES, width), np.uint8)).all()


@pytest.mark.parametrize("width", [6, 14, 32, 72, 128])
def test_one_and_two_flipped_bits_are_noticed(width: int) -> None:
    """Of one row: every bit, and every two of the highest bits of its words, the signs of floats."""
    row = random_rows(1, width)[0]
    bits = np.eye(8 * width, dtype=np.uint8)
    signs = np.flatnonzero(np.arange(8 * width) % 16 == 0)  # packbits puts a byte's highest bit first
    pairs = np.array([bits[i] | bits[j] for i in signs for j in signs if i < j])
    for flips in (bits, pairs.reshape(-1, 8 * width)):
        others = np.packbits(flips, axis=1) ^ row
        checks = row_checks(SEED, np.full(len(others), 9), others)
        missed = np.count_nonzero(checks == row_checks(SEED, np.array([9]), row[None])[0])
        assert missed <= 1, f"{missed} of {len(others)} flips pass"


def test_checks_are_spread_over_all_values() -> None:
    rows = np.zeros((1 << 20, 16), np.uint8)
    rows[:, 3] = 63  # alike but for their ids
    counts = np.bincount(row_checks(SEED, np.arange(len(rows)), rows), minlength=1 << 16)
    assert counts[0] == 0
    assert counts[1:].min() > 0  # of a mean of 16, with a chance of 0.7 % for a fair hash
    assert counts.max() < 60
