"""Which release a sidecar tells its clients, while others are activated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedding_store.errors import UnknownRelease
from embedding_store.open import open_backend
from embedding_store.releases import rollback
from tests.sidecar.random_release import make_release, put
from tests.sidecar.test_sidecar_client import check, until


def test_a_release_activated_meanwhile_is_told_when_it_is_warm(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    old, new = make_release("v1", 1), make_release("v2", 2)
    with open_backend(f"memmap://{tmp_path}") as backend:
        put(backend, old)
        client = start("--poll-seconds", "0.05", url=f"memmap://{tmp_path}").client()
        check(client, old, {"item": np.arange(10)})
        put(backend, new)
        check(client, new, {"item": np.arange(10)})  # who names a release is answered, warm or not
        until(lambda: client.manifest(model="feed") == new.manifest, "feed@v2 is told")
        assert [(entry.release, entry.active, entry.warm) for entry in client.releases()] == [
            ("feed@v1", False, True),
            ("feed@v2", True, True),
        ]
        assert "active=1,warm=1" in client.info()["feed@v2"]
        before = client.info()
        check(client, new, dict(new.hot))
        assert client.info()["cache_misses"] == before["cache_misses"]
        check(client, old, {"item": np.arange(10)})
        rollback(backend, "feed")
        until(lambda: client.manifest() == old.manifest, "feed@v1 is told again")


def test_a_release_is_not_told_while_nobody_looks(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    old, new = make_release("v1", 1), make_release("v2", 2)
    with open_backend(f"memmap://{tmp_path}") as backend:
        put(backend, old)
        client = start("--poll-seconds", "0", url=f"memmap://{tmp_path}").client()
        put(backend, new)
    assert client.manifest(model="feed") == old.manifest
    assert [(entry.active, entry.warm) for entry in client.releases()] == [(True, True), (False, False)]
    check(client, new, {"item": np.arange(10)})


def test_several_models_at_once(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Each answered from its own tables; a model that comes while the sidecar runs is told like the first ones."""
    feed, shop, ads = (make_release("v1", seed, model=model) for seed, model in enumerate(("feed", "shop", "ads")))
    with open_backend(f"memmap://{tmp_path}") as backend:
        put(backend, feed)
        put(backend, shop)
        process = start("--poll-seconds", "0.05", url=f"memmap://{tmp_path}")
        client = process.client()
        put(backend, ads)
    assert "feed@v1, shop@v1; warmed 5,936 rows" in process.ready
    until(lambda: "active=1" in client.info().get("ads@v1", ""), "ads@v1 is told")
    rng = np.random.default_rng(8)
    for release in (feed, shop, ads) * 3:
        check(client, release, release.random_ids(rng, 100))
        assert client.manifest(model=release.manifest.model) == release.manifest
    with pytest.raises(UnknownRelease, match=r"several active releases, name one: ads@v1, feed@v1, shop@v1"):
        client.manifest()


def test_a_release_that_cannot_be_warmed_keeps_no_other_model_back(start, redis_store) -> None:  # type: ignore[no-untyped-def]
    """At the start, and of a release that is activated while the sidecar runs."""
    old, new, broken = (
        make_release("v1", 1, model="shop"),
        make_release("v2", 2, model="shop"),
        make_release("v1", 3, model="ads"),
    )
    with open_backend(redis_store.url) as backend, redis_store.client() as redis:
        put(backend, old)
        before = set(redis.scan_iter("*:item:hot"))
        put(backend, broken)
        [hot] = set(redis.scan_iter("*:item:hot")) - before
        whole = redis.get(hot)
        redis.set(hot, whole[:-5])
        process = start("--poll-seconds", "0.05", url=redis_store.url)
        assert "(feed@v1, shop@v1; warmed" in process.ready
        client = process.client()
        put(backend, new)
        until(lambda: client.manifest(model="shop") == new.manifest, "shop@v2 is told")
        check(client, new, {"item": np.arange(10)})
        assert "active=1" not in client.info().get("ads@v1", "")
        redis.set(hot, whole)
        until(lambda: "active=1" in client.info().get("ads@v1", ""), "ads@v1 is told")
    _, errors = process.stop()
    assert errors.count("ads@v1 is not told, for it cannot be warmed: redis") == 1
    assert "the hot list of ads@v1's table 'item' has 19995 bytes; 2500 ids take 20000" in errors
