"""docs/operations.md says what is so: users, settings, metrics, options, sizes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedding_store.codec import bucket_rows, page_rows, row_bytes
from embedding_store.memory import MemoryStore
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.redis_memory import table_bytes
from embedding_store.redis_preflight import publisher_rights
from embedding_store.redis_rights import reader_rights
from embedding_store.release import Codec, TableInfo
from embedding_store.sidecar_metrics import SidecarMetrics
from embedding_store.sidecar_ready import Readiness
from embedding_store.sidecar_releases import ServedReleases
from embedding_store.sidecar_stats import SidecarStats
from tests.embedding_store.bundles import make_bundle
from tests.redis_server import RedisServer, free_port
from torchrank.serving.metrics import ServiceMetrics

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "operations.md").read_text()


def block(info: str) -> list[str]:
    """Lines of the fenced block with this info string."""
    found = re.search(rf"^```{re.escape(info)}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert found is not None, info
    return found[1].splitlines()


@pytest.mark.parametrize(("info", "cluster"), [("acl one server", False), ("acl cluster", True)])
def test_users_have_the_rights_that_were_tested(info: str, cluster: bool) -> None:
    """By tests/embedding_store/test_redis_acl.py, on a server and on a cluster."""
    rights = {
        "publisher": publisher_rights("torchrank", cluster=cluster),
        "sidecar": reader_rights("torchrank", cluster=cluster),
    }
    assert block(info) == [f"ACL SETUSER {name} on >PASSWORD {rules}" for name, rules in rights.items()]


@pytest.mark.parametrize("info", ["conf redis", "conf redis cluster"])
def test_a_server_starts_with_these_settings(info: str, tmp_path: Path) -> None:
    options = [part for line in block(info) for part in ("--" + line).split(" ", 1)]
    options = ["" if option == '""' else option for option in options]
    if "cluster" in info:
        options += ["--cluster-port", str(free_port())]
    server = RedisServer(*options)
    try:
        with server.client() as client:
            for name, value in zip(options[::2], options[1::2], strict=True):
                found = client.config_get(name[2:])[name[2:]]
                assert found == str(8 << 30) if name == "--maxmemory" else found == value
        if "cluster" not in info:
            with open_backend(server.url) as backend:
                publish(make_bundle(tmp_path / "bundle", seed=1).folder, backend)
    finally:
        server.close()


def test_every_metric_of_a_sidecar_is_in_the_table_and_no_other() -> None:
    with ThreadPoolExecutor(1) as threads:
        store, stats = MemoryStore(), SidecarStats()
        metrics = SidecarMetrics(store, stats, ServedReleases(store, threads), Readiness(stats.degraded, 0.5))
        measured = {family.name.removeprefix("torchrank_sidecar_") for family in metrics.collect()}
    table = TEXT[TEXT.index("| metric | alert |") : TEXT.index("Of a ranking service:")]
    rows = re.findall(r"^\| (.*?) \|", table, re.MULTILINE)[1:]
    named = {name.removesuffix("_total") for row in rows for name in re.findall(r"`([a-z_]+)", row)}
    assert named == measured


def test_metrics_of_a_service() -> None:
    there = ServiceMetrics("feed@1").exposition().decode()
    named = set(re.findall(r"`(torchrank_(?!sidecar)[a-z_]+)", TEXT))
    assert {"torchrank_requests_total", "torchrank_degraded_ids_total"} <= named
    assert not [name for name in named if not re.search(rf"^# \w+ {name}\b", there, re.MULTILINE)]


def test_commands_and_options_are_those_of_the_reference() -> None:
    reference = (DOCS / "cli.md").read_text()
    redis_options = {"--cluster", "--cluster-replicas"}  # of redis-cli
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - redis_options
    assert len(options) > 20
    assert not [option for option in options if not re.search(rf"{option}\b", reference)]
    commands = set(re.findall(r"torchrank (data feed|store plan|[a-z]+)\b", TEXT))
    assert {"publish", "sidecar", "gc", "store plan"} <= commands
    assert not [command for command in commands if f"## torchrank {command}\n" not in reference]


def gib(codec: Codec, dim: int, *, sparse: bool = False) -> float:
    width = row_bytes(codec, dim)
    rows = bucket_rows(width) if sparse else page_rows(width)
    table = TableInfo(
        name="item_id", rows=100_000_000, dim=dim, codec=codec, row_bytes=width, page_rows=rows, sha256="",
        ids="sparse" if sparse else "dense",
    )  # fmt: skip
    return table_bytes(table, cluster=True) / 2**30


def test_sizes_of_a_hundred_million_rows() -> None:
    rows = re.findall(r"^\| (\d+) \| ([\d.]+)(?: GiB)? \| ([\d.]+).*? \| ([\d.]+).*? \| ([\d.]+)", TEXT, re.MULTILINE)
    assert [row[0] for row in rows] == ["8", "16", "32", "64", "128"]
    for row in rows:
        dim = int(row[0])
        sizes = (gib("fp32", dim), gib("fp16", dim), gib("int8", dim), gib("fp16", dim, sparse=True))
        assert [f"{size:.1f}" for size in sizes] == list(row[1:])
