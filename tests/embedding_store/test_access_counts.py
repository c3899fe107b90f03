"""The histogram of a table's reads: what it groups, and that it survives a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedding_store.access_counts import AccessCounts, CountGroup, count_groups, read_counts, write_counts
from embedding_store.errors import InvalidRelease
from embedding_store.release import TableInfo

TABLE = TableInfo(name="item", rows=100_000, dim=4, codec="fp32", row_bytes=16, page_rows=511, sha256="")


def test_small_counts_are_exact_and_large_ones_close() -> None:
    rng = np.random.default_rng(3)
    asked = np.concatenate([np.repeat(np.arange(40), 50), rng.zipf(1.3, 5000) % (1 << 40)])
    reads = asked * rng.integers(1, 4, len(asked))
    counts = count_groups(asked, reads, requests=77)
    assert counts.requests == 77
    assert counts.ids == np.count_nonzero(asked)
    assert sum(group.asked for group in counts.groups) == asked.sum()
    assert sum(group.reads for group in counts.groups) == reads.sum()
    for count, group in zip(range(1, 32), counts.groups, strict=False):
        same = asked == count
        assert group == CountGroup(same.sum(), asked[same].sum(), reads[same].sum())
    ends = np.cumsum([group.ids for group in counts.groups])
    for group, members in zip(counts.groups, np.split(np.sort(asked[asked > 0]), ends[:-1]), strict=True):
        assert group.asked == members.sum()
        assert members[-1] <= members[0] * 17 / 16


def test_its_size_is_bounded() -> None:
    every = (np.int64(1) << np.arange(62)[:, None]) // 32 * np.arange(32, 65)
    counts = count_groups(every.ravel(), every.ravel(), requests=1)
    assert len(counts.groups) <= 16 * 62


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    counts = count_groups(np.array([0, 5, 5, 1, 0]), np.array([0, 6, 9, 1, 0]), requests=8)
    assert counts == AccessCounts(8, (CountGroup(1, 1, 1), CountGroup(2, 10, 15)))
    write_counts(tmp_path, "item", counts)
    assert read_counts(tmp_path, TABLE) == counts
    nothing = count_groups(np.zeros(9, np.int64), np.zeros(9, np.int64), requests=0)
    write_counts(tmp_path, "item", nothing)
    assert read_counts(tmp_path, TABLE) == AccessCounts(0, ())


def test_a_bundle_without_counts(tmp_path: Path) -> None:
    assert read_counts(tmp_path, TABLE) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", r"item\.counts: Object missing required field `requests`"),
        (b'{"requests": 1, "groups": [[1, 2]]}', r"item\.counts: Expected `array` of at least length 3, got 2"),
        (b'{"requests": 9, "groups": [[100001, 100001, 100001]]}', "counts 100001 ids; table 'item' has 100000 rows"),
        (b'{"requests": 9, "groups": [[3, 2, 2]]}', "a group has to have 0 < ids ≤ asked ≤ reads"),
    ],
)
def test_damaged_counts_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "item.counts").write_bytes(content)
    with pytest.raises(InvalidRelease, match=message):
        read_counts(tmp_path, TABLE)
