"""Redis stopped, restarted, paused, full, behind a password: errors that say so, and that give no secret away."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

from embedding_store.backend import namespace
from embedding_store.errors import StoreUnavailable, UnknownRelease
from embedding_store.open import open_backend, open_store
from embedding_store.publish import publish
from embedding_store.redis_url import PASSWORD_VARIABLE, parse_redis_url
from embedding_store.release import ReleaseManifest
from embedding_store.releases import activate
from tests.embedding_store.bundles import Bundle, TestTable, fetch, make_bundle
from tests.redis_server import RedisServer

IDS = {"item": np.arange(10, dtype=np.int64)}
SECRET = "sesame/2@x"
ESCAPED = "sesame%2F2%40x"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=2)


def test_a_stopped_server_is_named(redis_server: RedisServer, bundle: Bundle) -> None:
    redis_server.stop()
    host = rf"redis://127\.0\.0\.1:{redis_server.port}/0"
    with open_store(redis_server.tcp_url) as store:
        for ask in (
            lambda: store.lookup(bundle.name, IDS),
            lambda: store.manifest(model="demo"),
            lambda: publish(bundle.folder, store.backend),
            store.backend.releases,
        ):
            with pytest.raises(StoreUnavailable, match=rf"{host} cannot be reached: .*[Cc]onnection refused"):
                ask()


@pytest.mark.parametrize("tcp", [False, True])
def test_a_server_that_stops_while_it_serves(redis_server: RedisServer, bundle: Bundle, tcp: bool) -> None:
    url = redis_server.tcp_url if tcp else redis_server.url
    with open_store(url, cache_bytes=100_000) as store:
        publish(bundle.folder, store.backend)
        store.lookup(bundle.name, IDS)
        redis_server.stop()
        store.lookup(bundle.name, IDS)  # from the cache
        with pytest.raises(StoreUnavailable, match=r"redis.* cannot be reached"):
            store.lookup(bundle.name, {"item": np.arange(20, dtype=np.int64)})
        redis_server.start()  # empty: nothing was saved
        with pytest.raises(StoreUnavailable, match=r"has lost page 0 of table 'item' of demo@1 \(evicted or deleted\?"):
            store.lookup(bundle.name, {"item": np.arange(20, dtype=np.int64)})
        publish(bundle.folder, store.backend)
        reply = store.lookup(bundle.name, {"item": np.arange(20, dtype=np.int64)})
        assert (reply.tables["item"].status == 0).all()


def test_the_timeout_reaches_the_socket(redis_server: RedisServer, bundle: Bundle) -> None:
    with open_store(f"{redis_server.tcp_url}?timeout=0.5") as store:
        publish(bundle.folder, store.backend)
        store.lookup(bundle.name, IDS, timeout=10)
        redis_server.pause()
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.0[45]\d* s"):
            store.lookup(bundle.name, IDS, timeout=0.05)  # on a connection that was open
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.\d+ s"):
            store.lookup(bundle.name, {"item": np.arange(5000), "user": np.arange(1300)}, timeout=0.3)
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.[45]\d* s"):
            store.lookup(bundle.name, IDS)
        with pytest.raises(StoreUnavailable, match=r"did not answer within 0.5 s"):
            store.manifest(model="demo")
        redis_server.resume()
        assert (store.lookup(bundle.name, IDS).tables["item"].status == 0).all()


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("how", ["stopped", "CLIENT PAUSE"])
def test_a_release_that_was_never_read_is_read_within_the_timeout(
    redis_server: RedisServer, bundle: Bundle, how: str, tcp: bool
) -> None:
    url = f"{redis_server.tcp_url if tcp else redis_server.url}{'' if tcp else '?timeout=3'}"
    with open_backend(url) as backend, redis_server.client() as client:
        publish(bundle.folder, backend)
        if how == "stopped":
            redis_server.pause()
        else:
            client.execute_command("CLIENT", "PAUSE", "1000", "ALL")
        with open_store(url) as store:
            with pytest.raises(StoreUnavailable, match=r"did not answer within 0\.0[45]\d* s"):
                store.lookup(bundle.name, IDS, timeout=0.05)
            redis_server.resume()
            assert (store.lookup(bundle.name, IDS, timeout=10).tables["item"].status == 0).all()
            with pytest.raises(UnknownRelease, match=r"no release 'demo@9' in redis.*; it has: demo@1$"):
                store.lookup("demo@9", IDS, timeout=10)


def test_what_a_reading_of_the_release_took_is_missing_from_the_look_up_s_time(
    redis_server: RedisServer, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(redis_server.url) as store:
        publish(bundle.folder, store.backend)
        whole, given = store.backend.manifest, []

        def slow(release: str, *, timeout: float | None = None) -> ReleaseManifest:
            given.append(timeout)
            time.sleep(0.3)
            return whole(release, timeout=timeout)

        monkeypatch.setattr(store.backend, "manifest", slow)
        with pytest.raises(StoreUnavailable, match=r"no time was left to ask|not fetched within 0 s"):
            store.lookup(bundle.name, IDS, timeout=0.25)
        assert given == [0.25]


def test_a_full_server_refuses_the_release_and_keeps_the_active_one(tmp_path: Path) -> None:
    server = RedisServer("--maxmemory", "8mb", "--maxmemory-policy", "noeviction")
    try:
        with open_backend(server.url) as backend:
            small = make_bundle(tmp_path / "small", 1)
            publish(small.folder, backend)
            activate(backend, small.name)
            tables = (TestTable("item", "fp32", rows=200_000, dim=16),)
            large = make_bundle(tmp_path / "large", 2, version="2", tables=tables)
            with pytest.raises(StoreUnavailable, match="has no memory left for writing"):
                publish(large.folder, backend)
            assert backend.active("demo") == small.name
            assert list(backend.releases()) == [small.name]
            assert fetch(backend, small.name, IDS)["item"][1].all()
    finally:
        server.close()


@pytest.fixture
def guarded() -> Iterator[RedisServer]:
    server = RedisServer("--requirepass", SECRET)
    yield server
    server.close()


def everything_shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error)


def test_a_password_is_used_and_never_shown(
    guarded: RedisServer,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "password").write_text(f"{SECRET}\n")
    tcp = f"redis://:{ESCAPED}@127.0.0.1:{guarded.port}"
    for url in (
        tcp,
        f"redis+unix://:{ESCAPED}@{guarded.socket}",
        f"{guarded.url}?password_file={tmp_path / 'password'}",
    ):
        with open_store(url) as store:
            publish(bundle.folder, store.backend)
            assert (store.lookup(bundle.name, IDS).tables["item"].status == 0).all()
            assert SECRET not in store.backend.address
    monkeypatch.setenv(PASSWORD_VARIABLE, SECRET)
    with open_backend(guarded.tcp_url) as backend:
        assert fetch(backend, bundle.name, IDS)["item"][1].all()
        guarded.stop()
        for ask in (lambda: fetch(backend, bundle.name, IDS), backend.releases):
            with pytest.raises(StoreUnavailable) as caught:
                ask()
            assert SECRET not in everything_shown(caught.value)
    assert SECRET not in caplog.text
    assert SECRET not in repr(parse_redis_url(tcp))


def test_wrong_credentials_are_refused_without_showing_them(guarded: RedisServer, bundle: Bundle) -> None:
    for url, secret in ((f"redis://:wrong-one@127.0.0.1:{guarded.port}", "wrong-one"), (guarded.tcp_url, SECRET)):
        with open_backend(url) as backend, pytest.raises(StoreUnavailable, match="refused the credentials") as caught:
            publish(bundle.folder, backend)
        assert secret not in everything_shown(caught.value)
    with open_backend(f"redis://:{ESCAPED}@127.0.0.1:{guarded.port}") as backend:
        publish(bundle.folder, backend)
        with redis.Redis(unix_socket_path=str(guarded.socket), password=SECRET, protocol=2) as client:
            client.config_set("requirepass", "another")
        with pytest.raises(StoreUnavailable, match="refused the connection: WRONGPASS") as caught:
            fetch(backend, bundle.name, IDS)
        assert SECRET not in everything_shown(caught.value)


def test_a_user_without_a_password(redis_server: RedisServer, bundle: Bundle) -> None:
    """Rows are read as the user of the URL, not as `default`, who may do nothing here."""
    with redis_server.client() as client:
        client.execute_command("ACL SETUSER someone on nopass ~* +@all")
        client.execute_command("ACL SETUSER default off")
    with open_backend(f"redis+unix://someone@{redis_server.socket}") as backend:
        publish(bundle.folder, backend)
        assert fetch(backend, bundle.name, IDS)["item"][1].all()


def test_other_keys_are_left_alone_and_ours_are_where_they_should_be(redis_server: RedisServer, bundle: Bundle) -> None:
    with redis_server.client() as client:
        client.set("somebody:else", "1")
        with open_backend(f"{redis_server.url}?prefix=shop") as backend:
            publish(bundle.folder, backend)
            activate(backend, bundle.name)
        names = {key.decode() for key in client.scan_iter(count=10_000)}
        expected = {"somebody:else", "{shop}:releases", "{shop}:active", "{shop}:since"}
        for table in bundle.manifest.tables:
            place = f"shop:{namespace(bundle.manifest)}:{table.name}"
            expected |= {f"{place}:{page}" for page in range(table.pages)} | (
                {f"{place}:hot"} if table.hot_ids else set()
            )
        assert names == expected
        asked = {line["cmd"] if isinstance(line, dict) else line for line in client.info("commandstats")}
        assert not {"cmdstat_keys", "cmdstat_flushdb", "cmdstat_flushall"} & asked
        with open_backend(redis_server.url) as other_prefix:
            assert other_prefix.releases() == {}
