"""A complete release that is damaged on real stores: found, told, mended under the eyes of those who read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedding_store.backend import Backend
from embedding_store.errors import InvalidRelease, ReleaseConflict, UnknownRelease
from embedding_store.gc import collect
from embedding_store.mend import TableDamage, check, mend
from embedding_store.open import open_backend
from embedding_store.publish import Published, publish
from tests.embedding_store.bundles import Bundle, check_release, make_bundle
from tests.embedding_store.conftest import StoreUrl
from tests.embedding_store.damage import ITEM_PAGES, TABLES, Files, Keys, damager

KINDS = ("memmap", "redis", "redis+cluster")
# What is done -> what is found. Rows behind a page that was lost or cut are gone too.
DAMAGES: dict[str, tuple[Callable[[Keys | Files], None], TableDamage]] = {
    "lost pages": (lambda it: it.lose("item", 30), TableDamage("item", ITEM_PAGES, lost=((30, ITEM_PAGES - 1),))),
    "lost all": (lambda it: it.lose("item", 0), TableDamage("item", ITEM_PAGES, lost=((0, ITEM_PAGES - 1),))),
    "lost hot list": (lambda it: it.lose_hot("item"), TableDamage("item", ITEM_PAGES, hot=True)),
}
CHANGES: dict[str, tuple[Callable[[Keys | Files], None], TableDamage]] = {
    "first page": (lambda it: it.change("item", 0), TableDamage("item", ITEM_PAGES, changed=((0, 0),))),
    "last page": (lambda it: it.change("user", 20), TableDamage("user", 21, changed=((20, 20),))),
}


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, url_of: StoreUrl) -> str:
    return url_of(request.param)


def check_mended(backend: Backend, bundle: Bundle, url: str) -> None:
    """For one who read before, and for one who comes now."""
    assert check(bundle.folder, backend) == ()
    check_release(backend, bundle)
    with open_backend(url) as another:
        check_release(another, bundle)


def test_a_whole_release(backend: Backend, bundle: Bundle, url: str) -> None:
    assert check(bundle.folder, backend) == ()
    assert mend(bundle.folder, backend) == ()
    check_mended(backend, bundle, url)


@pytest.mark.parametrize("name", [*DAMAGES, *CHANGES])
def test_damage_is_found_and_mended(backend: Backend, bundle: Bundle, url: str, name: str) -> None:
    check_release(backend, bundle)
    damage, expected = (DAMAGES | CHANGES)[name]
    damage(damager(backend, bundle.name))
    assert check(bundle.folder, backend) == (expected,)
    assert check(bundle.folder, backend) == (expected,), "looking at it changes nothing"
    assert mend(bundle.folder, backend) == (expected,)
    check_mended(backend, bundle, url)


@pytest.mark.parametrize("name", DAMAGES)
def test_publishing_again_mends_what_was_lost(backend: Backend, bundle: Bundle, url: str, name: str) -> None:
    damage, expected = DAMAGES[name]
    damage(damager(backend, bundle.name))
    assert publish(bundle.folder, backend) == Published(bundle.manifest, new=False, mended=(expected,))
    check_mended(backend, bundle, url)


@pytest.mark.parametrize("name", CHANGES)
def test_publishing_again_does_not_look_into_pages(backend: Backend, bundle: Bundle, name: str) -> None:
    damage, expected = CHANGES[name]
    damage(damager(backend, bundle.name))
    assert publish(bundle.folder, backend) == Published(bundle.manifest, new=False)
    assert check(bundle.folder, backend) == (expected,)


def test_a_page_that_was_cut(backend: Backend, bundle: Bundle, url: str) -> None:
    it = damager(backend, bundle.name)
    it.cut("item", 33)
    (damage,) = publish(bundle.folder, backend).mended
    kept = isinstance(it, Keys)  # in a Redis it is a page still, though another
    assert damage == TableDamage(
        "item", ITEM_PAGES, lost=((34 if kept else 33, ITEM_PAGES - 1),), changed=((33, 33),) if kept else ()
    )  # fmt: skip
    check_mended(backend, bundle, url)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_of_several_kinds(backend: Backend, bundle: Bundle, url: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    it = damager(backend, bundle.name)
    changed = np.sort(rng.choice(30, 5, replace=False)).tolist()
    for page in changed:
        it.change("item", page)
    it.cut("item", int(rng.integers(30, 35)))
    it.lose("user", int(rng.integers(1, 21)))
    it.lose_hot("raw")
    damages = {damage.table: damage for damage in mend(bundle.folder, backend)}
    assert list(damages) == ["item", "raw", "user"]
    found = [page for first, last in damages["item"].changed for page in range(first, last + 1)]
    assert [page for page in found if page < 30] == changed
    assert damages["raw"] == TableDamage("raw", bundle.manifest.table("raw").pages, hot=True)
    check_mended(backend, bundle, url)


def test_a_damaged_bundle_is_not_written_over_a_release(backend: Backend, bundle: Bundle, url: str) -> None:
    path = bundle.folder / "tables" / "item.pages"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    for compare in (check, mend):
        with pytest.raises(InvalidRelease, match=r"item.pages does not have the checksum"):
            compare(bundle.folder, backend)
    path.write_bytes(whole)
    check_mended(backend, bundle, url)


def test_what_is_not_there_or_another_is_not_mended(backend: Backend, bundle: Bundle, tmp_path: Path) -> None:
    absent = make_bundle(tmp_path / "absent", 1, version="2", tables=TABLES)
    other = make_bundle(tmp_path / "other", 2, tables=TABLES)
    for compare in (check, mend):
        with pytest.raises(UnknownRelease, match=r"no release 'demo@2' in .*, or it is not complete"):
            compare(absent.folder, backend)
        with pytest.raises(ReleaseConflict, match="has a release demo@1 with other content"):
            compare(other.folder, backend)
    check_release(backend, bundle)


def test_gc_leaves_alone_what_is_being_mended(backend: Backend, bundle: Bundle, url: str) -> None:
    damager(backend, bundle.name).lose("user", 3)
    reasons = set()

    def collecting(step: str, done: int, total: int) -> None:
        with open_backend(url) as another:
            reasons.update(decision.reason.partition(" by ")[0] for decision in collect(another, keep=0, grace=0))

    mend(bundle.folder, backend, progress=collecting)
    assert reasons == {"pinned"}
    assert backend.pins() == {}
    check_mended(backend, bundle, url)


def test_damage_in_words() -> None:
    runs = tuple((first, first) for first in range(0, 20, 2))
    damage = TableDamage("item", 36, lost=((1, 1), (7, 9)), changed=runs, hot=True)
    shown = "0, 2, 4, 6, 8, 10, 12, 14, …"
    words = f"item: 4 of 36 pages lost (1, 7-9), 10 of 36 pages changed ({shown}), hot list lost or changed"
    assert str(damage) == words
