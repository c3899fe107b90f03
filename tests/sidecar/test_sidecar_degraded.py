"""A sidecar whose Redis stands still: what stands in for rows, and that every stand-in is flagged."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store import resp
from embedding_store.errors import StoreUnavailable
from embedding_store.lookup import ABSENT, FOUND, STALE, UNAVAILABLE
from embedding_store.open import open_backend
from embedding_store.protocol import encode_request
from tests.sidecar.random_release import make_release, put
from tests.sidecar.raw_socket import connect
from tests.sidecar.test_sidecar_client import check, until


def test_stand_ins_by_table_and_their_status_on_the_wire(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    """`item` takes the earlier release's row and then the default; `user` the default; the others are errors."""
    process = start(
        "--on-unavailable", "item=cache,previous,default", "--on-unavailable", "user=cache,default",
        "--max-default-share", "0.6", "--poll-seconds", "0.05", url=redis_store.url,
    )  # fmt: skip
    client = process.client()
    cold = {name: np.setdiff1d(np.arange(len(release.tables[name])), release.hot[name]) for name in release.tables}
    seen = cold["item"][:30]
    check(client, release, {"item": seen})  # now in the cache, of feed@v1
    newer = make_release("v2", 5)
    with open_backend(redis_store.url) as backend:
        put(backend, newer)
    until(lambda: client.manifest(model="feed") == newer.manifest, "feed@v2 is told")
    unseen = np.setdiff1d(cold["item"], [*seen, *newer.hot["item"]])[:10]
    hot = np.setdiff1d(newer.hot["item"], seen)[:40]
    stale = np.setdiff1d(seen, newer.hot["item"])
    asked = np.concatenate((hot, stale, unseen))
    users = np.setdiff1d(cold["user"], newer.hot["user"])[:8]
    redis_store.pause()
    try:
        reply = client.lookup("feed@v2", {"item": asked, "user": users}, timeout=2).tables
        with pytest.raises(StoreUnavailable, match="ids unavailable"):
            client.lookup("feed@v2", {"category": np.arange(37)}, timeout=1)
        with pytest.raises(StoreUnavailable, match="at most 60% may be default rows"):
            client.lookup("feed@v2", {"item": hot[:4], "user": users}, timeout=1)
    finally:
        redis_store.resume()
    rows, status = reply["item"].rows[reply["item"].index].view(np.float16), reply["item"].status[reply["item"].index]
    np.testing.assert_array_equal(status, [FOUND] * len(hot) + [STALE] * len(stale) + [UNAVAILABLE] * len(unseen))
    np.testing.assert_array_equal(rows[: len(hot)], newer.expected("item", hot))
    np.testing.assert_array_equal(rows[len(hot) : len(hot) + len(stale)], release.expected("item", stale))
    np.testing.assert_array_equal(rows[-len(unseen) :], np.float16(0.5))
    assert set(reply["user"].status) == {UNAVAILABLE}
    np.testing.assert_array_equal(reply["user"].rows.view(np.float16), np.float16(0.5))
    info = client.info()
    assert (int(info["stale"]), int(info["unavailable"])) == (len(stale), len(unseen) + len(users))
    assert int(info["errorstat_UNAVAILABLE"].removeprefix("count=")) == 2
    until(lambda: _is_whole(client, newer, {"item": asked, "user": users}), "the store answers again")


def _is_whole(client, release, ids: dict[str, np.ndarray]) -> bool:  # type: ignore[no-untyped-def]
    try:
        reply = client.lookup(release.manifest.name, ids).tables
    except StoreUnavailable:
        return False
    if any(np.isin(table.status, (UNAVAILABLE, STALE)).any() for table in reply.values()):
        return False
    check(client, release, ids)
    return True


def test_a_misspelt_table_is_told_in_log_and_info(start) -> None:  # type: ignore[no-untyped-def]
    process = start("--on-unavailable", "itm=cache,default", "--on-unavailable", "user=cache,default")
    assert process.client().info()["on_unavailable_unknown_tables"] == "itm"
    warning = (
        "--on-unavailable names 'itm', which no release in use has (feed@v1); their tables are: category, item, user"
    )
    assert warning in process.stop()[1]
    right = start("--on-unavailable", "item=cache,default")
    assert "on_unavailable_unknown_tables" not in right.client().info()
    assert "--on-unavailable" not in right.stop()[1]


def test_an_id_that_does_not_exist_is_not_degraded(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    client = start("--on-unavailable", "cache,default", url=redis_store.url).client()
    cold = int(np.setdiff1d(np.arange(5000), release.hot["item"])[0])
    redis_store.pause()
    try:
        table = client.lookup("feed@v1", {"item": np.array([-5, cold])}, timeout=1).tables["item"]
    finally:
        redis_store.resume()
    np.testing.assert_array_equal(table.status, [ABSENT, UNAVAILABLE])


def test_a_release_that_was_never_read_is_read_within_the_look_up_s_time(start, redis_store) -> None:  # type: ignore[no-untyped-def]
    process = start("--poll-seconds", "0", url=redis_store.url)
    with open_backend(redis_store.url) as backend:
        put(backend, make_release("v2", 5))
    request = resp.command(b"TR.LOOKUP", encode_request("feed@v2", {"item": np.arange(10)}, 0.2))
    with connect(process.socket) as asking:
        redis_store.pause()
        try:
            asking.sendall(request)
            answer = asking.recv(1000)
        finally:
            redis_store.resume()
        assert answer.startswith(b"-UNAVAILABLE ")
        assert b"did not answer within 0." in answer
        asking.sendall(request)
        assert asking.recv(100).startswith(b"$")


def test_a_known_release_is_told_while_every_thread_waits_for_the_store(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--threads", "1", "--poll-seconds", "0", url=redis_store.url)
    cold = int(np.setdiff1d(np.arange(5000), release.hot["item"])[0])
    with connect(process.socket) as waiting:
        redis_store.pause()
        try:
            waiting.sendall(resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": np.array([cold])}, 60.0)))
            client = process.client(timeout=3)
            until(lambda: client.info()["lookups_waiting"] == "1", "the look-up has the only thread")
            assert client.manifest(model="feed") == release.manifest
            assert process.client(timeout=3).manifest("feed@v1") == release.manifest
            assert client.info()["lookups_waiting"] == "1"
        finally:
            redis_store.resume()
        assert waiting.recv(100).startswith(b"$")
