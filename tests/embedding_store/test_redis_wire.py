"""Commands and replies of the read path, against naive Python and hiredis."""

from __future__ import annotations

import hiredis
import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.batch import IdBatch
from embedding_store.buckets import bucket_bounds, buckets_of, encode_buckets
from embedding_store.lookup import ABSENT, FOUND, UNAVAILABLE
from embedding_store.redis_fetch import PageFetch, PageKeys
from embedding_store.redis_keys import Record
from embedding_store.redis_wire import ANSWERED, DAMAGED, LOST, REFUSED, ROW_BYTES, WAITING
from embedding_store.release import ReleaseManifest, TableInfo
from embedding_store.row_checks import table_seed, with_checks
from embedding_store.sparse import mixed_ids
from tests.embedding_store.check_reference import bucket, stored

ASKING = b"*1\r\n$6\r\nASKING\r\n"


def random_fetch(rng: np.random.Generator, *, ids: int = 200) -> PageFetch:
    """Over three tables, one of which is not asked; about a fifth of the ids is absent."""
    tables = []
    for name in ("a", "some_longer.name", "c"):
        width, rows = int(rng.integers(1, 300)), int(10 ** rng.integers(0, 15))
        tables.append(TableInfo(name, rows, 1, "fp32", width, int(rng.integers(1, 5000)), sha256=""))
    record = Record("0123456789abcdef", ReleaseManifest("m", "1", "2026-01-02T03:04:05Z", tuple(tables)))
    counts = np.array([ids // 3, ids - ids // 3])
    wanted = [
        rng.integers(0, max(1, tables[place].rows * 5 // 4), count)
        for place, count in zip((2, 0), counts.tolist(), strict=True)
    ]
    return PageFetch(PageKeys("shop", record), IdBatch(np.array([2, 0]), counts, np.concatenate(wanted)))


def naive_commands(fetch: PageFetch, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> list[bytes]:
    tables = [place for place, count in zip((2, 0), counts.tolist(), strict=True) for _ in range(count)]
    commands = []
    for place, row in zip(tables, ids.tolist(), strict=True):
        table = fetch.keys.record.manifest.tables[place]
        if 0 <= row < table.rows:
            key = f"shop:0123456789abcdef:{table.name}:{row // table.page_rows}".encode()
            start = row % table.page_rows * table.stored_bytes
            arguments = (b"GETRANGE", key, b"%d" % start, b"%d" % (start + table.stored_bytes - 1))
            commands.append(b"*4\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(one), one) for one in arguments))
    return commands


@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_commands_are_what_redis_expects(seed: int, asking: bool) -> None:
    rng = np.random.default_rng(seed)
    fetch = random_fetch(rng)
    expected = naive_commands(fetch, fetch._ids, np.array([66, 134]))
    assert fetch.size == len(expected)
    chosen = rng.permutation(fetch.size)[: fetch.size // 2]
    buffer = np.empty(int(rng.integers(400, 4000)), np.uint8)
    sent, first = [], 0
    while first < len(chosen):
        before = first
        first, size = fetch.encode(chosen, first, int(rng.integers(1, 50)), asking, buffer)
        assert before < first
        sent.append(buffer[:size].tobytes())
    assert b"".join(sent) == b"".join((ASKING if asking else b"") + expected[command] for command in chosen.tolist())


def decode_in_parts(
    rng: np.random.Generator, fetch: PageFetch, commands: NDArray[np.int64], stream: bytes, asking: bool
) -> tuple[int, dict[int, str], bool]:
    """Feeds the stream as it might be received; returns replies read, error lines by command, and whether all was
    sound."""
    buffer = np.frombuffer(stream, np.uint8).copy()
    errors = np.empty((3, 3), np.int64)
    refused: dict[int, str] = {}
    at = end = replies = 0
    while True:
        at, replies, found, sound = fetch.decode(buffer, at, end, commands, replies, asking, errors)
        for command, begin, line_end in errors[:found].tolist():
            refused[command] = buffer[begin:line_end].tobytes().decode()
        if not sound or (end == len(buffer) and found < len(errors)):
            return replies, refused, sound
        if found < len(errors):
            end = min(len(buffer), end + int(rng.integers(1, 1 + int(rng.choice([3, 50, 5000])))))


@pytest.mark.parametrize("asking", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_replies_split_anywhere_are_read_as_hiredis_reads_them(seed: int, asking: bool) -> None:
    rng = np.random.default_rng(seed)
    fetch = random_fetch(rng)
    commands = rng.permutation(fetch.size)
    stream, damaged = b"", set()
    for command in commands.tolist():
        table = fetch.keys.record.manifest.tables[fetch.tables[command]]
        row = rng.integers(0, 256, table.row_bytes, np.uint8).tobytes()
        whole = bytearray(stored(table, int(fetch._ids[fetch._members[command]]), row))
        kind = rng.choice(["whole", "whole", "whole", "short", "changed", "none", "error"])
        if kind == "short":
            del whole[int(rng.integers(0, len(whole))) :]
        if kind == "changed":
            whole[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
            damaged.add(command)
        answer = {"none": b"$-1\r\n", "error": b"-ERR x\r\n"}.get(kind, b"$%d\r\n%s\r\n" % (len(whole), whole))
        stream += (b"+OK\r\n" if asking else b"") + answer
    reader = hiredis.Reader()
    reader.feed(stream)
    replies, refused, sound = decode_in_parts(rng, fetch, commands, stream, asking)
    assert sound
    assert replies == len(commands) * (1 + asking)
    widths, position = fetch.keys.geometry[:, ROW_BYTES], {}
    for command in range(fetch.size):
        position[command] = int(fetch._members[command])
    for command in commands.tolist():
        if asking:
            assert reader.gets() == b"OK"
        expected = reader.gets()
        target, width = int(fetch._targets[position[command]]), int(widths[fetch.tables[command]])
        if isinstance(expected, hiredis.ReplyError):
            assert (refused[command], fetch.outcome[command]) == (str(expected), REFUSED)
        elif not expected:
            assert fetch.outcome[command] == LOST
        elif len(expected) < width + 2 or command in damaged:
            assert fetch.outcome[command] == DAMAGED
        else:
            assert fetch.outcome[command] == ANSWERED
            assert fetch.rows[target : target + width].tobytes() == expected[:-2]
        found = fetch.outcome[command] == ANSWERED
        assert fetch.status[position[command]] == (FOUND if found else UNAVAILABLE)
    absent = np.setdiff1d(np.arange(200), list(position.values()))
    assert (fetch.status[absent] == ABSENT).all()


@pytest.mark.parametrize(
    "reply",
    [b"$200\r\n", b":1\r\n", b"*1\r\n$1\r\nx\r\n", b"$x\r\n", b"$\r\n", b"$-2\r\n", b"+OK\r\n", b"$9999999999\r\n"],
)
def test_what_cannot_be_the_reply_ends_the_reading(reply: bytes) -> None:
    """A desynchronised stream must never become wrong rows."""
    table = TableInfo("a", 100, 1, "fp32", 100, 10, sha256="")
    record = Record("0123456789abcdef", ReleaseManifest("m", "1", "2026-01-02T03:04:05Z", (table,)))
    fetch = PageFetch(PageKeys("shop", record), IdBatch(np.array([0]), np.array([3]), np.array([1, 2, 3])))
    first, third = (b"$102\r\n%s\r\n" % stored(table, key, bytes(100)) for key in (1, 3))
    stream = first + reply + third
    replies, _, sound = decode_in_parts(np.random.default_rng(0), fetch, fetch.all(), stream, False)
    assert (replies, sound) == (1, False)
    assert fetch.outcome.tolist() == [ANSWERED, WAITING, WAITING]
    assert fetch.status.tolist() == [FOUND, UNAVAILABLE, UNAVAILABLE]


def test_an_error_for_asking_is_not_taken_for_that_of_the_next_command() -> None:
    table = TableInfo("a", 100, 1, "fp32", 2, 10, sha256="")
    record = Record("0123456789abcdef", ReleaseManifest("m", "1", "2026-01-02T03:04:05Z", (table,)))
    fetch = PageFetch(PageKeys("shop", record), IdBatch(np.array([0]), np.array([2]), np.array([1, 2])))
    stream = b"-NOPERM\r\n-MOVED 1 h:1\r\n+OK\r\n$4\r\n%s\r\n" % stored(table, 2, b"xy")
    replies, refused, sound = decode_in_parts(np.random.default_rng(0), fetch, fetch.all(), stream, True)
    assert (replies, sound, refused) == (4, True, {0: "MOVED 1 h:1"})
    assert fetch.status.tolist() == [UNAVAILABLE, FOUND]
    assert fetch.rows[2:].tobytes() == b"xy"


@pytest.mark.parametrize("seed", range(5))
def test_buckets_split_anywhere_give_the_rows_of_all_their_ids(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, rows = int(rng.integers(1, 100)), 400
    table = TableInfo("s", rows, 1, "fp32", width, 10, sha256="", ids="sparse")
    record = Record("0123456789abcdef", ReleaseManifest("m", "1", "2026-01-02T03:04:05Z", (table,)))
    known = np.unique(rng.integers(-(2**63), 2**63 - 1, rows))
    values = {row: rng.integers(0, 256, width, np.uint8).tobytes() for row in known.tolist()}
    order = known[np.argsort(mixed_ids(known))]
    bounds = bucket_bounds(order, 0, table.pages, table.pages)
    content = np.frombuffer(b"".join(values[row] for row in order.tolist()), np.uint8).reshape(rows, width)
    seed_of_table = table_seed(table)
    encoded, starts = encode_buckets(seed_of_table, 0, order, with_checks(seed_of_table, order, content), bounds)
    asked = rng.permutation(np.concatenate((known[:300], rng.integers(-(2**63), 2**63 - 1, 50))))
    fetch = PageFetch(PageKeys("shop", record), IdBatch(np.array([0]), np.array([350]), asked))
    assert np.unique(fetch.pages[: fetch.size]).tolist() == np.unique(buckets_of(asked, table.pages)).tolist()
    assert len(np.unique(fetch.pages[: fetch.size])) == fetch.size  # one command a bucket

    commands = rng.permutation(fetch.size)
    gone, cut, changed = commands[:3]
    stream, sent = b"", np.empty(1 << 16, np.uint8)
    _, size = fetch.encode(commands, 0, len(commands), False, sent)
    expected = b""
    for command in commands.tolist():
        bucket = int(fetch.pages[command])
        key = f"shop:0123456789abcdef:s:{bucket}".encode()
        expected += b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key)
        one = bytearray(encoded[starts[bucket] : starts[bucket + 1]])[: -1 if command == cut else None]
        if command == changed:
            one[: len(one) - 1] = rng.bytes(len(one) - 1)  # garbage
        stream += b"$-1\r\n" if command == gone else b"$%d\r\n%s\r\n" % (len(one), one)
    assert sent[:size].tobytes() == expected
    replies, refused, sound = decode_in_parts(rng, fetch, commands, stream, False)
    assert (replies, refused, sound) == (fetch.size, {}, True)
    lost = fetch.pages[[gone, cut, changed]]
    for position, row in enumerate(asked.tolist()):
        if buckets_of(asked[position : position + 1], table.pages)[0] in lost:
            assert fetch.status[position] == UNAVAILABLE
        elif row not in values:
            assert fetch.status[position] == ABSENT
        else:
            assert fetch.status[position] == FOUND
            assert fetch.rows[position * width : (position + 1) * width].tobytes() == values[row]
    assert np.flatnonzero(fetch.outcome == LOST).tolist() == [gone]
    assert np.flatnonzero(fetch.outcome == DAMAGED).tolist() == sorted([cut, changed])


def test_of_a_bucket_only_the_rows_that_were_changed_are_refused() -> None:
    table = TableInfo("s", 40, 1, "fp32", 24, 40, sha256="", ids="sparse")  # all in one bucket
    ids = np.arange(40)[np.argsort(mixed_ids(np.arange(40)))]
    rows = {key: bytes([key] * 24) for key in ids.tolist()}
    one = bytearray(bucket(table, 0, rows))
    one[6 + 40 * 8 + 3 * 26 + 5] ^= 4  # row 3
    one[-1] ^= 128  # check of the last row
    one[6 + 7 * 8] ^= 64  # id 7: it is another's now, and that of row 7 is not there
    record = Record("0123456789abcdef", ReleaseManifest("m", "1", "2026-01-02T03:04:05Z", (table,)))
    fetch = PageFetch(PageKeys("shop", record), IdBatch(np.array([0]), np.array([42]), np.append(ids, [1000, 1001])))
    stream = b"$%d\r\n%s\r\n" % (len(one), bytes(one))
    assert decode_in_parts(np.random.default_rng(0), fetch, fetch.all(), stream, False) == (1, {}, True)
    bad = [3, 7, 39, 40, 41]  # no id can be called absent of a bucket whose ids were changed
    assert np.flatnonzero(fetch.status == UNAVAILABLE).tolist() == bad
    for position in np.flatnonzero(fetch.status == FOUND).tolist():
        assert fetch.rows[position * 24 : (position + 1) * 24].tobytes() == rows[int(ids[position])]
    assert fetch.outcome[:1].tolist() == [DAMAGED]
    error = fetch.result("redis://h").error
    assert "redis://h has a damaged page 0 of table 's' of m@1" in str(error)
    assert "torchrank verify BUNDLE --store URL --mend" in str(error)
