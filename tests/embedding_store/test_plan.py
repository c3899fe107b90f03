"""Sizes of a bundle in Redis nodes, and the command that shows them with the forecast of its caches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from embedding_store.access_counts import count_groups, write_counts
from embedding_store.byte_sizes import format_size, parse_size
from embedding_store.open import open_backend
from embedding_store.plan import plan_bundle
from embedding_store.publish import publish
from tests.embedding_store.bundles import Bundle, TestTable, make_bundle
from tests.redis_server import RedisServer
from torchrank.cli import cli

TABLES = (
    TestTable("item", "fp16", rows=300_000, dim=16, hot=500),
    TestTable("user", "fp32", rows=60_000, dim=32, hot=100, default=True),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With counts of 12,000 ids a table, of which the i-th is asked for 1/i as often as the first."""
    made = make_bundle(tmp_path_factory.mktemp("plan") / "bundle", seed=1, tables=TABLES)
    for table in TABLES:
        asked = 12_000 // (1 + np.arange(table.rows))
        write_counts(made.folder / "tables", table.name, count_groups(asked, 3 * asked, 12_000))
    return made


def torchrank(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def test_two_releases_take_what_was_planned(bundle: Bundle, redis_server: RedisServer, tmp_path: Path) -> None:
    planned = plan_bundle(bundle.folder, releases=2).redis
    other = make_bundle(tmp_path / "other", seed=2, tables=TABLES, version="2")
    with redis_server.client() as client:
        before = client.info("memory")["used_memory"]
        with open_backend(redis_server.url) as backend:
            for one in (bundle, other):
                publish(one.folder, backend)
        used = client.info("memory")["used_memory"] - before
    assert used == pytest.approx(planned.data_bytes, rel=0.02)
    assert planned.data_bytes < planned.maxmemory < planned.host_bytes == planned.total_bytes


def test_nodes_share_the_pages_and_replicas_double_them(bundle: Bundle) -> None:
    one, six = plan_bundle(bundle.folder).redis, plan_bundle(bundle.folder, nodes=3, replicas=1).redis
    assert six.data_bytes == pytest.approx(one.data_bytes / 3, rel=0.01)  # keys of a cluster are a little larger
    assert six.total_bytes == 6 * six.host_bytes
    assert plan_bundle(bundle.folder, releases=4).redis.data_bytes == 2 * one.data_bytes


def test_another_codec(bundle: Bundle) -> None:
    planned = plan_bundle(bundle.folder, codec="int8")
    assert [(table.codec, table.row_bytes, table.bytes) for table in planned.tables] == [
        ("int8", 20, 6_600_000),
        ("int8", 36, 2_280_000),
    ]
    assert planned.caches[0].entries > plan_bundle(bundle.folder).caches[0].entries


def test_cache_sizes_go_up_to_where_everything_fits(bundle: Bundle) -> None:
    planned = plan_bundle(bundle.folder)
    assert [cache.bytes >> 10 for cache in planned.caches] == [64, 256, 1024, 4096, 16384]
    rates = [cache.rates["lru"].raw for cache in planned.caches]
    assert (np.diff(rates) > 0).all()
    assert rates[-1] == 1
    assert [sizes.hit_rate for sizes in planned.cache_sizes] == [0.90, 0.95, 0.99]


def test_the_command_shows_it(bundle: Bundle) -> None:
    result = torchrank("store", "plan", bundle.folder, "--nodes", "3", "--replicas", "2", "--cache-size", "512KiB")
    assert result.exit_code == 0, result.output
    for text in (
        "demo@1",
        "│ item  │ 300,000 │  16 │  fp16 │          32 │       9.73MiB │",
        "│ all   │ 360,000 │",
        "Redis: 3 masters, 2 replicas each, 2 releases",
        "memory to give all nodes",
        "│ 512KiB │",
        "│ 99%      │",
    ):
        assert text in result.output


def test_the_commands_json_is_the_plan(bundle: Bundle) -> None:
    result = torchrank("store", "plan", bundle.folder, "--cache-size", "512KiB", "--cache-size", "1MiB", "--json")
    printed = json.loads(result.output.splitlines()[-1])
    planned = plan_bundle(bundle.folder, cache_sizes=[1 << 19, 1 << 20])
    assert printed["release"] == "demo@1"
    assert [table["redis_bytes"] for table in printed["tables"]] == [table.redis_bytes for table in planned.tables]
    assert printed["redis"]["maxmemory"] == planned.redis.maxmemory
    assert [cache["bytes"] for cache in printed["caches"]] == [1 << 19, 1 << 20]
    assert printed["caches"][1]["rates"]["s3fifo"]["raw"] == planned.caches[1].rates["s3fifo"].raw
    assert printed["cache_sizes"][2]["bytes"] == planned.cache_sizes[2].bytes


def test_a_bundle_without_counts_shows_sizes_only(tmp_path: Path) -> None:
    made = make_bundle(tmp_path / "bundle", seed=3)
    result = torchrank("store", "plan", made.folder, "--cache-size", "1MiB")
    assert result.exit_code == 0, result.output
    assert "Redis: one node, 2 releases" in result.output
    assert result.output.endswith("does not say how often ids are asked for (tables/*.counts): no hit rates\n")
    printed = json.loads(torchrank("store", "plan", made.folder, "--json").output)
    assert printed["caches"] == printed["cache_sizes"] == []


def test_what_is_no_bundle_or_size_is_one_line(bundle: Bundle, tmp_path: Path) -> None:
    for arguments, message in (
        ((tmp_path,), f"Error: {tmp_path} is not a bundle: manifest.json: No such file or directory\n"),
        ((bundle.folder, "--cache-size", "much"), "Error: size 'much': expected a number and a unit, as in 512MiB"),
    ):
        result = torchrank("store", "plan", *arguments)
        assert result.exit_code == 1
        assert result.output.startswith(message)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0B"), (999, "999B"), (1 << 20, "1MiB"), (1 << 30, "1GiB"), (5_641_024, "5.38MiB")]
)
def test_sizes_as_people_write_them(size: int, text: str) -> None:
    assert format_size(size) == text
    assert parse_size(text) == pytest.approx(size, rel=0.005)
