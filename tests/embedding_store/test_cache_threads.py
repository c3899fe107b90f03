"""Readers without a lock beside writers, and beside a memory that is divided anew: never a row that is not whole."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedding_store.cache_columns import SETS
from embedding_store.cache_gate import Gate
from embedding_store.hot_cache import HotCache
from embedding_store.release import ReleaseManifest
from tests.embedding_store.cached_rows import Asked, manifest_of, table_of

READERS = 4


def releases_of(model: str) -> list[ReleaseManifest]:
    """Two with the same ids. Rows of 8 words and rows that end with single bytes."""
    tables = (table_of("long", 3000, 64), table_of("odd", 3000, 21), table_of("sparse", 2000, 64, sparse=True))
    return [manifest_of(*tables, model=model, version=version) for version in "12"]


def read(asked: list[Asked], seed: int, stop: threading.Event, goal: int) -> int:
    """Hits, until there are `goal` and `stop` is set; `Asked.ask` checks each of them."""
    rng = np.random.default_rng(seed)
    hits = 0
    while hits < goal or not stop.is_set():
        release = asked[int(rng.integers(len(asked)))]
        ids = {table.name: rng.zipf(1.1, 700) * 31 % (table.rows * 9 // 8) for table in release.manifest.tables}
        hits += int(release.ask(ids).sum())
    return hits


@pytest.mark.parametrize(("policy", "goal"), [("s3fifo", 1_000_000), ("lru", 300_000)])
def test_rows_are_whole_and_right(policy: str, goal: int) -> None:
    """Rows read while others are written in their place: 40 sets, so that all meet in each."""
    cache = HotCache(40 * 640 + 64, policy)
    asked = [Asked(cache, manifest) for manifest in releases_of("m")]
    stop = threading.Event()
    stop.set()
    with ThreadPoolExecutor(READERS) as threads:
        hits = sum(threads.map(lambda seed: read(asked, seed, stop, goal // READERS), range(READERS)))
    print(f"{policy}: {hits} rows read")
    assert hits >= goal
    stats = cache.stats()
    tables = [table for release in stats.releases.values() for table in release.values()]
    assert sum(table.hits for table in tables) == hits
    assert sum(table.evictions for table in tables) > 10_000
    for release in asked:
        for table in release.manifest.tables:
            held = release.held({table.name: np.arange(table.rows * 9 // 8 + 1)}).sum()
            assert stats.releases[release.manifest.name][table.name].entries == held


def test_rows_are_right_while_the_memory_is_divided_anew() -> None:
    cache = HotCache(150_000)
    asked = [Asked(cache, manifest) for manifest in releases_of("m")]
    stop = threading.Event()
    rng = np.random.default_rng(7)
    parts = set()
    with ThreadPoolExecutor(READERS) as threads:
        reading = [threads.submit(read, asked, seed, stop, 20_000) for seed in range(READERS)]
        try:
            for number in range(150):
                table = table_of("t", 6000, int(rng.integers(1, 20)) * 8)
                Asked(cache, manifest_of(table, model="other", version=str(number))).warm(np.arange(2000))
                parts.add(tuple(cache._layout.classes[:, SETS]))
                cache.forget(f"other@{number}")
        finally:
            stop.set()
    assert sum(reader.result() for reader in reading) >= READERS * 20_000
    assert len(parts) > 50


def test_registering_at_the_same_time_gives_one_answer() -> None:
    cache = HotCache(100_000)
    manifest = releases_of("m")[0]
    ready = threading.Barrier(8)

    def register(_: int) -> int:
        ready.wait()
        return id(cache.tables(manifest))

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(register, range(8)))) == 1


def test_the_gate() -> None:
    gate = Gate()
    assert gate.enter()
    assert gate.enter()
    alone, done = threading.Event(), threading.Event()

    def rearrange() -> None:
        with gate.closing():
            alone.set()
            done.wait()

    rearranging = threading.Thread(target=rearrange)
    rearranging.start()
    gate.leave()
    while not gate.closed:
        threading.Event().wait(0.001)
    assert not gate.enter()  # nobody comes in while it waits
    assert not alone.wait(0.05)  # for there is still one inside
    gate.leave()
    assert alone.wait(60)
    assert not gate.enter()
    done.set()
    rearranging.join()
    assert gate.enter()


def test_the_gate_opens_again_when_the_wait_for_readers_is_interrupted() -> None:
    gate = Gate()
    assert gate.enter()

    def interrupt() -> None:
        while not gate.closed:
            threading.Event().wait(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt), gate.closing():
        pass
    interrupting.join()
    assert gate.enter()
