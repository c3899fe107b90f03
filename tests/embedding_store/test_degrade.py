"""What stands in for rows when a real Redis is gone, and that it is never silent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.codec import decode
from embedding_store.degrade import DegradePolicy, parse_policy, parse_steps
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import ABSENT, FOUND, STALE, UNAVAILABLE, LookupReply
from embedding_store.open import open_store
from embedding_store.publish import publish
from embedding_store.store import EmbeddingStore
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.redis_server import RedisServer

TABLES = (
    TestTable("item", "fp16", rows=3000, dim=16, hot=300, default=True),
    TestTable("user", "fp32", rows=900, dim=8, hot=100),
)
HOT = 50  # of each table, in the cache


@pytest.fixture
def old(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "old", 1, version="1", tables=TABLES)


@pytest.fixture
def new(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "new", 2, version="2", tables=TABLES)


@pytest.fixture
def store(
    redis_server: RedisServer, old: Bundle, new: Bundle, request: pytest.FixtureRequest
) -> Iterator[EmbeddingStore]:
    """`old` with ids 0 … 199 of each table in the cache, `new` with 0 … 49, and no server any more."""
    with open_store(redis_server.url, cache_bytes=10_000_000, degrade=request.param) as store:
        for bundle, ids in ((old, np.arange(200)), (new, np.arange(HOT))):
            publish(bundle.folder, store.backend)
            store.lookup(bundle.name, {"item": ids, "user": np.append(ids, -7)})
        redis_server.stop()
        yield store


def policies(*policies: DegradePolicy) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("store", policies, indirect=True, ids=lambda policy: ",".join(policy.steps))


def values(reply: LookupReply, bundle: Bundle, table: str) -> NDArray[np.float32]:
    answer = reply.tables[table]
    return decode(bundle.manifest.table(table).codec, answer.rows)[answer.index]


IDS = {"item": np.array([3, 120, 3, 2999], np.int64), "user": np.array([-7, 7, 150], np.int64)}


@policies(DegradePolicy(), DegradePolicy(("error",)))
def test_strict_look_ups_fail_unless_the_cache_has_everything(store: EmbeddingStore, new: Bundle) -> None:
    cached = {"item": np.arange(HOT), "user": np.array([-7, 7])}
    reply = store.lookup(new.name, cached)
    np.testing.assert_array_equal(values(reply, new, "item"), new.expected("item", cached["item"])[0])
    assert reply.tables["user"].status.tolist() == [ABSENT, FOUND]
    with pytest.raises(StoreUnavailable, match=r"of 6 ids unavailable: 'item' 2 \(policy"):
        store.lookup(new.name, {"item": IDS["item"], "user": np.array([1, 2, 3])})


@policies(DegradePolicy(("cache", "previous", "default")))
def test_stale_rows_then_default_rows_each_with_its_status(store: EmbeddingStore, old: Bundle, new: Bundle) -> None:
    reply = store.lookup(new.name, IDS)
    item, user = reply.tables["item"], reply.tables["user"]
    assert item.status[item.index].tolist() == [FOUND, STALE, FOUND, UNAVAILABLE]
    assert user.status[user.index].tolist() == [ABSENT, FOUND, STALE]
    expected_new, expected_old = new.expected("item", IDS["item"])[0], old.expected("item", IDS["item"])[0]
    got = values(reply, new, "item")
    np.testing.assert_array_equal(got[[0, 2]], expected_new[[0, 2]])
    np.testing.assert_array_equal(got[1], expected_old[1])
    np.testing.assert_array_equal(got[3], new.values["item"][-1])
    np.testing.assert_array_equal(values(reply, new, "user")[2], old.expected("user", IDS["user"])[0][2])
    counts = store.stats().releases[new.name]["item"]
    assert (counts.found, counts.stale, counts.unavailable, counts.absent) == (HOT + 1, 1, 1, 0)


@policies(DegradePolicy(("cache", "default")))
def test_without_the_step_no_stale_row_is_given(store: EmbeddingStore, new: Bundle) -> None:
    reply = store.lookup(new.name, IDS)
    item = reply.tables["item"]
    assert item.status[item.index].tolist() == [FOUND, UNAVAILABLE, FOUND, UNAVAILABLE]
    np.testing.assert_array_equal(values(reply, new, "item")[1], new.values["item"][-1])


@policies(DegradePolicy(("default",), {"user": ("previous", "error")}))
def test_every_table_has_its_own_steps(store: EmbeddingStore, new: Bundle) -> None:
    assert store.lookup(new.name, IDS).tables["user"].status.tolist() == [ABSENT, FOUND, STALE]
    with pytest.raises(StoreUnavailable, match=r"unavailable: 'user' 1 \(policy previous,error\)"):
        store.lookup(new.name, IDS | {"user": np.array([150, 899], np.int64)})


@policies(DegradePolicy(("default",), max_default_share=0.4))
def test_too_many_default_rows_are_an_error(store: EmbeddingStore, new: Bundle) -> None:
    ids = np.array([0, 1, 2, 2998, 2999], np.int64)
    assert store.lookup(new.name, {"item": ids}).tables["item"].status.tolist() == [FOUND] * 3 + [UNAVAILABLE] * 2
    with pytest.raises(StoreUnavailable, match="at most 40% may be default rows"):
        store.lookup(new.name, {"item": np.append(ids, 2997)})


@policies(DegradePolicy(("default",), max_default_share=0.004))
def test_the_limit_is_told_as_it_was_set(store: EmbeddingStore, new: Bundle) -> None:
    with pytest.raises(StoreUnavailable, match=r"'item' 1 \(at most 0\.4% may be default rows\)"):
        store.lookup(new.name, {"item": np.array([2999])})


@policies(DegradePolicy(("previous", "default")))
def test_the_earliest_release_has_none_before_it(store: EmbeddingStore, old: Bundle) -> None:
    assert store.lookup(old.name, IDS).tables["item"].status.tolist() == [FOUND, FOUND, UNAVAILABLE]


def test_a_table_of_another_shape_is_no_stand_in(redis_server: RedisServer, old: Bundle, tmp_path: Path) -> None:
    wider = make_bundle(tmp_path / "wider", 3, version="2", tables=(TestTable("item", "fp16", rows=3000, dim=32),))
    policy = DegradePolicy(("previous", "default"))
    with open_store(redis_server.url, cache_bytes=10_000_000, degrade=policy) as store:
        for bundle, ids in ((old, np.arange(200)), (wider, np.arange(1))):
            publish(bundle.folder, store.backend)
            store.lookup(bundle.name, {"item": ids})
        redis_server.stop()
        assert store.lookup(wider.name, {"item": np.array([7])}).tables["item"].status.tolist() == [UNAVAILABLE]


def test_policies_are_read_from_options() -> None:
    policy = parse_policy(["cache, previous,default", "item=error"], 0.2)
    assert policy == DegradePolicy(("cache", "previous", "default"), {"item": ("error",)}, 0.2)
    assert policy.of("item") == ("error",)
    assert policy.of("user") == ("cache", "previous", "default")
    assert parse_policy([]) == DegradePolicy(("cache", "error"), {}, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cash", "'cash' is unknown; accepted: cache, previous, default, error"),
        ("", "'' is unknown"),
        ("cache,cache", "'cache' occurs twice in cache,cache"),
        ("default,previous", "'previous' is never reached after 'default'"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_steps(text)


def test_a_share_is_between_0_and_1() -> None:
    with pytest.raises(ValueError, match="share of defaults 20; accepted: 0 to 1"):
        DegradePolicy(max_default_share=20)
