"""torchrank verify, and publish of a release that is complete already, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from embedding_store.open import open_backend
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.embedding_store.conftest import StoreUrl
from tests.embedding_store.damage import damager
from torchrank.cli import cli

TABLES = (TestTable("item", "fp16", rows=9000, dim=16, hot=50), TestTable("user", "fp32", rows=900, dim=8))


@pytest.fixture(params=["memmap", "redis"])
def url(request: pytest.FixtureRequest, url_of: StoreUrl) -> str:
    return url_of(request.param)


@pytest.fixture
def bundle(url: str, tmp_path: Path) -> Bundle:
    made = make_bundle(tmp_path / "bundle", 3, tables=TABLES)
    assert torchrank("publish", made.folder, "--store", url, "--activate").exit_code == 0
    return made


def torchrank(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def verify(bundle: Bundle, url: str, *options: str) -> Result:
    return torchrank("verify", bundle.folder, "--store", url, *options)


def damage(bundle: Bundle, url: str) -> None:
    with open_backend(url) as backend:
        it = damager(backend, bundle.name)
        it.change("item", 4)
        it.lose("item", 34)
        it.lose_hot("item")


DAMAGED = "item: 4 of 38 pages lost (34-37), 1 of 38 pages changed (4), hot list lost or changed"


def test_a_whole_release(bundle: Bundle, url: str) -> None:
    result = verify(bundle, url, "--rate-limit", "100MiB")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("demo@1: every byte is as published in ")
    result = torchrank("publish", bundle.folder, "--store", url)
    assert result.exit_code == 0, result.output
    first, second = result.output.splitlines()
    assert first.startswith("demo@1: complete already, all pages there (torchrank verify compares what is in them) in ")
    assert second == "demo@1 is active"


def test_what_differs_is_listed_and_mended_on_demand(bundle: Bundle, url: str) -> None:
    damage(bundle, url)
    for _ in range(2):
        result = verify(bundle, url)
        assert result.exit_code == 1
        first, second = result.output.splitlines()
        assert first == DAMAGED
        assert second.startswith("demo@1: damaged (torchrank verify --mend writes it again) in ")
    result = verify(bundle, url, "--mend")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == f"mended {DAMAGED}"
    assert verify(bundle, url).exit_code == 0


def test_as_json(bundle: Bundle, url: str) -> None:
    damage(bundle, url)
    found = {"table": "item", "pages": 38, "lost": [[34, 37]], "changed": [[4, 4]], "hot": True}
    for options, code in (((), 1), (("--mend",), 0)):
        result = verify(bundle, url, "--json", *options)
        assert result.exit_code == code
        answer = json.loads(result.output.splitlines()[-1])
        assert answer.pop("store").startswith(url[:12])
        assert answer == {"release": "demo@1", "damaged": [found], "whole": code == 0}
    assert json.loads(verify(bundle, url, "--json").output.splitlines()[-1])["damaged"] == []


def test_publish_says_what_it_mended(bundle: Bundle, url: str) -> None:
    damage(bundle, url)
    result = torchrank("publish", bundle.folder, "--store", url)
    assert result.exit_code == 0, result.output
    first, second, third = result.output.splitlines()
    assert first == f"mended {DAMAGED}"
    assert second.startswith("demo@1: compared with the bundle, mended and whole in ")
    assert third == "demo@1 is active"


def test_a_release_that_is_not_there(url: str, tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle", 3, tables=TABLES)
    with open_backend(url) as backend:
        backend.create()
    result = verify(made, url)
    assert result.exit_code == 1
    assert result.output.startswith("Error: no release 'demo@1' in ")
