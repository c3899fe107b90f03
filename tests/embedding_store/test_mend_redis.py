"""What can happen to pages in a Redis, and not to files."""

from __future__ import annotations

import pytest

from embedding_store.backend import Backend
from embedding_store.chunks import Chunk
from embedding_store.errors import InvalidRelease, StoreNotReady
from embedding_store.mend import TableDamage, check, mend
from embedding_store.publish import publish
from embedding_store.redis_pages import RedisPages
from embedding_store.release import TableInfo
from tests.embedding_store.bundles import Bundle
from tests.embedding_store.damage import ITEM_PAGES, Keys, damager
from tests.embedding_store.test_mend import check_mended
from tests.redis_server import RedisServer


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def it(backend: Backend, bundle: Bundle) -> Keys:
    found = damager(backend, bundle.name)
    assert isinstance(found, Keys)
    return found


def test_a_key_that_holds_no_string(bundle: Bundle, it: Keys, url: str) -> None:
    for what in (2, "hot"):
        it.backend.control.delete(it.key("item", what))
        it.backend.control.hset(it.key("item", what), "no", "string")
    expected = TableDamage("item", ITEM_PAGES, changed=((2, 2),), hot=True)
    assert publish(bundle.folder, it.backend).mended == (expected,)
    check_mended(it.backend, bundle, url)


def test_a_bucket_that_lacks_one_row(bundle: Bundle, it: Keys, url: str) -> None:
    """Its length is that of a bucket; all together have one row too few."""
    bucket = it.page("raw", 7)
    rows = int.from_bytes(bucket[2:6], "little")
    assert len(bucket) == 6 + rows * (8 + 34)
    count = (rows - 1).to_bytes(4, "little")
    shorter = bucket[:2] + count + bucket[6 : 6 + 8 * (rows - 1)] + bucket[6 + 8 * rows : -34]
    it.backend.control.set(it.key("raw", 7), shorter)
    table = bundle.manifest.table("raw")
    assert it.backend.pages(bundle.name).lost_pages(table) == 1
    assert publish(bundle.folder, it.backend).mended == (TableDamage("raw", table.pages, changed=((7, 7),)),)
    check_mended(it.backend, bundle, url)


def test_pages_are_not_written_where_they_would_be_evicted_again(
    backend: Backend, bundle: Bundle, it: Keys, redis_server: RedisServer
) -> None:
    it.lose("item", 30)
    redis_server.client().config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(StoreNotReady, match="maxmemory-policy is allkeys-lru"):
        publish(bundle.folder, backend)
    assert check(bundle.folder, backend) != ()


def test_what_was_written_is_read_back(
    backend: Backend, bundle: Bundle, it: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    it.lose("item", 34)
    write = RedisPages.write

    def write_and_damage(pages: RedisPages, table: TableInfo, chunk: Chunk) -> None:
        write(pages, table, chunk)
        it.change("item", 35)

    monkeypatch.setattr(RedisPages, "write", write_and_damage)
    with pytest.raises(InvalidRelease, match="gives back page 35 of table 'item' not as it was written"):
        mend(bundle.folder, backend)
