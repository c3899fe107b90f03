"""The commands publish, releases, activate and rollback, as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from embedding_store.byte_sizes import format_size
from embedding_store.errors import StoreUnavailable
from tests.embedding_store.bundles import Bundle, make_bundle
from tests.redis_server import RedisServer
from torchrank.cli import cli


@pytest.fixture(params=["memmap", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memmap":
        return f"memmap://{tmp_path / 'store'}"
    server_url: str = request.getfixturevalue("redis_server").url
    return server_url


@pytest.fixture
def bundles(tmp_path: Path) -> list[Bundle]:
    return [make_bundle(tmp_path / version, int(version), version=version) for version in ("1", "2")]


def torchrank(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def listed(url: str) -> dict[str, str]:
    result = torchrank("releases", "--store", url, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output.splitlines()[-1])
    assert answer["store"].startswith(url[:12])
    return {
        one["name"]: "active" if one["active"] else one["state"]
        for one in answer["releases"]
    }  # fmt: skip


def test_the_life_of_two_releases(url: str, bundles: list[Bundle]) -> None:
    first, second = bundles
    result = torchrank("publish", first.folder, "--store", url)
    assert result.exit_code == 0, result.output
    size = sum(table.bytes for table in first.manifest.tables)
    assert f"demo@1: {len(first.manifest.tables)} tables, {size:,} bytes, verified in" in result.output
    assert "not active yet: torchrank activate demo@1" in result.output
    assert listed(url) == {"demo@1": "ready"}

    assert torchrank("activate", "demo@1", "--store", url).output == "demo@1 is active; before: none\n"
    assert torchrank("activate", "demo@1", "--store", url).output == "demo@1 was active already\n"
    result = torchrank("publish", second.folder, "--store", url, "--activate")
    assert result.output.endswith("demo@2 is active; before: demo@1\n")
    assert listed(url) == {"demo@1": "ready", "demo@2": "active"}

    table = torchrank("releases", "--store", url).output
    assert "demo@1" in table
    assert format_size(size) in table
    assert torchrank("rollback", "demo", "--store", url).output == "demo@1 is active again; it was demo@2\n"
    assert listed(url) == {"demo@1": "active", "demo@2": "ready"}


def test_errors_are_one_line(url: str, bundles: list[Bundle], tmp_path: Path) -> None:
    torchrank("publish", bundles[0].folder, "--store", url)
    for arguments, message in (
        (("rollback", "demo"), "Error: no release of model 'demo' was ever active in"),
        (("activate", "demo@7"), "Error: no release 'demo@7' in"),
        (("publish", tmp_path), f"Error: {tmp_path} is not a bundle: manifest.json: No such file or directory"),
    ):
        result = torchrank(*arguments, "--store", url)
        assert result.exit_code == 1
        assert result.output.startswith(message)
        assert result.output.count("\n") == 1


def test_a_store_that_cannot_be_reached(redis_server: RedisServer, tmp_path: Path) -> None:
    redis_server.stop()
    result = torchrank("releases", "--store", redis_server.tcp_url)
    assert result.exit_code == 1
    assert f"Error: redis://127.0.0.1:{redis_server.port}/0 cannot be reached" in result.output
    result = torchrank("releases", "--store", f"memmap://{tmp_path / 'nowhere'}")
    assert result.output.endswith("nowhere cannot be reached: there is no such directory\n")
    assert issubclass(StoreUnavailable, ConnectionError)
