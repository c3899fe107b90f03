"""Tables of raw 64-bit ids in every store: published, fetched, looked up through a cache, lost and damaged."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import Backend, namespace
from embedding_store.codec import decode
from embedding_store.errors import InvalidRelease, StoreUnavailable
from embedding_store.lookup import ABSENT, FOUND
from embedding_store.memory import MemoryStore
from embedding_store.open import open_backend, open_store
from embedding_store.publish import publish
from embedding_store.sparse_pages import map_ids
from tests.embedding_store.bundles import Bundle, TestTable, check_rows, fetch, make_bundle
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer

TABLES = (
    TestTable("raw", "fp32", rows=3000, dim=32, hot=200, default=True, sparse=True),
    TestTable("dense", "fp16", rows=500, dim=8, hot=10),
    TestTable("narrow", "int8", rows=2000, dim=4, sparse=True),
    TestTable("one", "fp16", rows=1, dim=3, sparse=True),
    TestTable("broad", "fp32", rows=7, dim=3000, default=True, sparse=True),  # buckets of one row, some empty
)
EXTREMES = np.array([0, -1, 2**63 - 1, -(2**63), 2**32, 5])
BACKENDS = ("memmap", "redis+unix", "redis+cluster")


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memmap":
        return f"memmap://{tmp_path / 'store'}"
    if request.param == "redis+cluster":
        cluster: RedisCluster = request.getfixturevalue("redis_cluster")
        return f"{cluster.url}?prefix={secrets.token_hex(8)}"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url


@pytest.fixture
def backend(url: str) -> Iterator[Backend]:
    with open_backend(url) as backend:
        yield backend


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=5, tables=TABLES)


def known_and_unknown(bundle: Bundle, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Per table distinct ids in random order: about n that it has, a third as many that it has not."""
    wanted = {}
    for table in bundle.manifest.tables:
        known = np.array(list(bundle.raw.get(table.name, range(table.rows))), np.int64)
        others = rng.integers(-(2**63), 2**63 - 1, n // 3)
        wanted[table.name] = rng.permutation(np.unique(np.concatenate((rng.permutation(known)[:n], others, EXTREMES))))
    return wanted


def test_a_published_release_gives_back_every_row(backend: Backend, bundle: Bundle) -> None:
    assert publish(bundle.folder, backend).manifest == bundle.manifest
    wanted = known_and_unknown(bundle, np.random.default_rng(0), 10_000)
    for name, (rows, found) in fetch(backend, bundle.name, wanted).items():
        check_rows(bundle, name, wanted[name], rows, found)
    for table in bundle.manifest.tables:
        np.testing.assert_array_equal(backend.hot_ids(bundle.name, table.name), bundle.hot[table.name])


@pytest.mark.parametrize("seed", range(4))
def test_some_ids_of_some_tables(backend: Backend, bundle: Bundle, seed: int) -> None:
    publish(bundle.folder, backend)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        wanted = known_and_unknown(bundle, rng, int(rng.integers(0, 300)))
        wanted = {name: wanted[name] for name in rng.permutation(list(wanted)).tolist()[: rng.integers(1, 6)]}
        for name, (rows, found) in fetch(backend, bundle.name, wanted).items():
            check_rows(bundle, name, wanted[name], rows, found)


def test_a_look_up_answers_absent_ids_by_the_default_row_before_and_after_they_are_cached(
    backend: Backend, bundle: Bundle, url: str
) -> None:
    publish(bundle.folder, backend)
    rng = np.random.default_rng(8)
    wanted = {
        name: rng.choice(ids, 2 * len(ids)) for name, ids in known_and_unknown(bundle, rng, 100).items()
    }  # with repetitions
    with open_store(url, cache_bytes=1 << 20) as store:
        for _ in range(3):
            reply = store.lookup(bundle.name, wanted)
            for name, rows in reply.tables.items():
                expected, present = bundle.expected(name, wanted[name])
                got = decode(bundle.manifest.table(name).codec, rows.rows)[rows.index]
                np.testing.assert_array_equal(got, expected, err_msg=name)
                np.testing.assert_array_equal(rows.status[rows.index], np.where(present, FOUND, ABSENT), err_msg=name)


def test_a_lost_bucket_is_damage_and_not_an_absent_id(backend: Backend, bundle: Bundle, url: str) -> None:
    publish(bundle.folder, backend)
    some = np.array(list(bundle.raw["narrow"])[:50], np.int64)
    lose_a_bucket(url, bundle, some[0])
    with open_backend(url) as fresh:
        with pytest.raises(StoreUnavailable, match=r"narrow"):
            fetch(fresh, bundle.name, {"narrow": some})
        others = np.array(list(bundle.raw["raw"])[:50], np.int64)
        check_rows(bundle, "raw", others, *fetch(fresh, bundle.name, {"raw": others})["raw"])


def lose_a_bucket(url: str, bundle: Bundle, key: np.int64) -> None:
    """The one of table `narrow` that this id is in; of files, the end of the ids."""
    from embedding_store.buckets import buckets_of
    from embedding_store.redis_backend import RedisBackend
    from embedding_store.redis_keys import page_key
    from embedding_store.redis_url import parse_redis_url

    if url.startswith("memmap://"):
        path = Path(url.removeprefix("memmap://")) / "releases" / bundle.name / "tables" / "narrow.ids"
        path.write_bytes(path.read_bytes()[:-8])
        return
    bucket = int(buckets_of(np.array([key]), bundle.manifest.table("narrow").pages)[0])
    with RedisBackend(parse_redis_url(url)) as redis:
        content_key = page_key(redis.prefix, namespace(bundle.manifest), "narrow", bucket)
        assert redis.control.delete(content_key) == 1


@pytest.mark.parametrize("kind", ["pages", "ids"])
def test_a_damaged_bundle_is_not_published(backend: Backend, bundle: Bundle, kind: str) -> None:
    path = bundle.folder / "tables" / f"raw.{kind}"
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidRelease, match=rf"raw.{kind} does not have the checksum|out of their order: damaged"):
        publish(bundle.folder, backend)
    path.write_bytes(content[:-1])
    with pytest.raises(InvalidRelease, match=rf"raw.{kind} has {len(content) - 1} bytes; 3000 .* take {len(content)}"):
        publish(bundle.folder, backend)
    assert backend.releases() == {}


def test_progress_ends_at_the_size_of_all_files_written_and_read_back(backend: Backend, bundle: Bundle) -> None:
    steps: list[tuple[str, int, int]] = []
    publish(bundle.folder, backend, progress=lambda *step: steps.append(step))
    files = [path for path in (bundle.folder / "tables").iterdir() if path.suffix in (".pages", ".ids")]
    total = 2 * sum(path.stat().st_size for path in files)
    assert steps[-1] == ("verified broad", total, total)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)


def test_a_memory_store_answers_raw_ids(bundle: Bundle) -> None:
    """Whatever the order of the rows that it is given."""
    rng, manifest, folder = np.random.default_rng(3), bundle.manifest, bundle.folder / "tables"
    rows, ids = {}, {}
    for table in manifest.tables:
        rows[table.name] = np.fromfile(folder / f"{table.name}.pages", np.uint8).reshape(table.rows, -1)[
            :, : table.row_bytes
        ]
        if table.sparse:
            order = rng.permutation(table.rows)
            ids[table.name], rows[table.name] = map_ids(folder, table)[order], rows[table.name][order]
    store = MemoryStore()
    store.add(manifest, rows, ids)
    wanted = known_and_unknown(bundle, rng, 200)
    for name, answer in store.lookup(manifest.name, wanted).tables.items():
        expected, present = bundle.expected(name, wanted[name])
        np.testing.assert_array_equal(answer.status[answer.index], np.where(present, FOUND, ABSENT), err_msg=name)
        got = decode(manifest.table(name).codec, answer.rows)[answer.index]
        np.testing.assert_array_equal(got, expected, err_msg=name)
    with pytest.raises(InvalidRelease, match="table 'raw' has no ids; its manifest says 3000 rows of sparse ids"):
        store.add(manifest, rows)
    twice = {**ids, "raw": np.concatenate((ids["raw"][:-1], ids["raw"][:1]))}
    with pytest.raises(InvalidRelease, match="'raw' has 2999 distinct ids; its manifest says 3000 rows of sparse"):
        store.add(manifest, rows, twice)
