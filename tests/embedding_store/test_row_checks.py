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


def missed(width: int, flips: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """flips int64 [k, bits]: of each the bits to flip, bit b being in byte b // 8. In how many of 64 rows of floats
    with different ids the check stays, int64 [k]."""
    rng = np.random.default_rng(seed)
    n, ids = 64, rng.integers(-(2**63), 2**63 - 1, 64)
    rows = rng.standard_normal((n, -(-width // 2))).astype("<f2").view(np.uint8)[:, :width]
    masks = np.zeros((len(flips), width), np.uint8)
    for bits in flips.T:
        np.bitwise_xor.at(masks, (np.arange(len(flips)), bits // 8), (1 << bits % 8).astype(np.uint8))
    flips_rows = (masks[:, None] ^ rows).reshape(-1, width)
    checks = row_checks(SEED, np.tile(ids, len(flips)), flips_rows).reshape(-1, n)
    stays = checks == row_checks(SEED, ids, rows)
    return np.count_nonzero(stays[masks.any(axis=1)], axis=1)


def check_flips(width: int, flips: NDArray[np.int64], seed: int = 0) -> None:
    """No pattern passes more often than chance has it, nor do all together."""
    found = missed(width, flips, seed)
    assert found.max() <= 3, f"flips of bits {flips[found.argmax()].tolist()} pass in {found.max()} of 64 rows"
    expected = 64 * len(found) / 2**16
    assert found.sum() <= 4 + expected + 6 * expected**0.5, f"{found.sum()} of {64 * len(found)} pass"


@pytest.mark.parametrize("width", [6, 14, 32, 72, 128])
def test_a_flipped_bit_is_noticed(width: int) -> None:
    check_flips(width, np.arange(8 * width)[:, None])


@pytest.mark.parametrize("width", [6, 14, 32, 64, 72, 128])
def test_two_flipped_bits_are_noticed(width: int) -> None:
    """Of every two words, and of each: the same bit, all signs of fp16, and others by chance."""
    rng = np.random.default_rng(width)
    same = np.repeat(np.arange(64)[:, None], 2, axis=1)
    signs = np.stack(np.meshgrid([15, 31, 47, 63], [15, 31, 47, 63]), axis=-1).reshape(-1, 2)
    words = -(-width // 8)
    for one in range(words):
        within = np.concatenate((same, signs, rng.integers(0, 64, (64, 2))))
        pairs = np.concatenate([within + np.array([64 * one, 64 * other]) for other in range(one, words)])
        pairs = pairs[(pairs < 8 * width).all(axis=1) & (pairs[:, 0] != pairs[:, 1])]
        check_flips(width, pairs, seed=one)


@pytest.mark.parametrize("width", [64, 128])
def test_flips_that_follow_the_hash_are_noticed(width: int) -> None:
    """Three bits that cancelled out where a step was linear in the highest one: it, and what became of it a word of the
    same lane later. And all signs of the row, or of its last four words."""
    words = width // 8
    later = [
        [64 * word + 63, 64 * (word + 4) + bit, 64 * (word + 4) + 63] for word in range(words - 4) for bit in range(63)
    ]
    check_flips(width, np.array(later))
    check_flips(width, np.arange(15, 8 * width, 16)[None])
    for bit in range(64):
        check_flips(width, np.array([[64 * word + bit for word in range(words - 4, words)]]))


def test_checks_are_spread_over_all_values() -> None:
    rows = np.zeros((1 << 20, 16), np.uint8)
    rows[:, 3] = 63  # alike but for their ids
    counts = np.bincount(row_checks(SEED, np.arange(len(rows)), rows), minlength=1 << 16)
    assert counts[0] == 0
    assert counts[1:].min() > 0  # of a mean of 16, with a chance of 0.7 % for a fair hash
    assert counts.max() < 60
