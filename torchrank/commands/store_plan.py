"""`torchrank store plan`: what a bundle's tables take in Redis, and what a cache of them answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from embedding_store.plan import Plan

_POLICIES = {"lru": "LRU", "s3fifo": "S3-FIFO (default)", "ideal": "ideal"}


@click.group()
def store() -> None:
    """Plan the memory of a store and of its caches."""


@store.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--cache-size", "cache_sizes", multiple=True, metavar="SIZE",
    help="Of a sidecar, as in 256MiB; may be repeated. By default several, up to where all rows fit.",
)  # fmt: skip
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True, help="Redis masters; 1: no cluster.")
@click.option("--replicas", type=click.IntRange(0), default=0, show_default=True, help="Of each master.")
@click.option(
    "--releases", type=click.IntRange(1), default=2, show_default=True,
    help="Kept beside each other: the active one, and the one that is published.",
)  # fmt: skip
@click.option("--row-codec", type=click.Choice(["fp32", "fp16", "int8"]), help="As if exported with this codec.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line, instead of the tables.")
def plan(
    bundle: Path,
    cache_sizes: tuple[str, ...],
    nodes: int,
    replicas: int,
    releases: int,
    row_codec: str | None,
    as_json: bool,
) -> None:
    """Memory of Redis nodes for BUNDLE, and hit rates by size of the cache.

    Hit rates are predicted from how often the training data name each id, for requests like theirs: of all ids that
    requests name, repeats within a request and all.
    """
    import msgspec

    from embedding_store.byte_sizes import parse_size
    from embedding_store.codec import check_codec
    from embedding_store.plan import plan_bundle

    found = plan_bundle(
        bundle,
        cache_sizes=[parse_size(size) for size in cache_sizes],
        nodes=nodes,
        replicas=replicas,
        releases=releases,
        codec=None if row_codec is None else check_codec(row_codec),
    )
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        _print(found, bundle)


def _print(found: Plan, bundle: Path) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    shown = {found.release: _tables(found), _redis_title(found): _nodes(found)}
    if found.caches:
        shown |= {"Hit rate by --cache-size": _caches(found), "--cache-size by hit rate": _cache_sizes(found)}
    for title, table in shown.items():
        console.print(Text(title, style="bold"), table, sep="\n")
    if not found.caches:
        click.echo(f"{bundle} does not say how often ids are asked for (tables/*.counts): no hit rates")


def _table(*headings: str) -> Table:
    """The first column is text, the others are numbers."""
    from rich.table import Table

    table = Table()
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    return table


def _tables(found: Plan) -> Table:
    from embedding_store.byte_sizes import format_size

    shown = _table("table", "rows", "dim", "codec", "bytes a row", "in the bundle", "in Redis")
    for table in found.tables:
        name = f"{table.name} (sparse ids)" if table.ids == "sparse" else table.name
        row = (f"{table.rows:,}", str(table.dim), table.codec, str(table.row_bytes))
        shown.add_row(name, *row, format_size(table.bytes), format_size(table.redis_bytes))
    shown.add_section()
    rows = sum(table.rows for table in found.tables)
    sizes = (sum(table.bytes for table in found.tables), sum(table.redis_bytes for table in found.tables))
    shown.add_row("all", f"{rows:,}", "", "", "", *map(format_size, sizes))
    return shown


def _redis_title(found: Plan) -> str:
    redis = found.redis
    nodes = "one node" if redis.nodes == 1 else f"{redis.nodes} masters"
    replicas = f", {redis.replicas} replica{'s' * (redis.replicas > 1)} each" if redis.replicas else ""
    return f"Redis: {nodes}{replicas}, {redis.releases} release{'s' * (redis.releases > 1)}"


def _nodes(found: Plan) -> Table:
    from embedding_store.byte_sizes import format_size

    redis = found.redis
    shown = _table("of a node", "memory")
    shown.add_row("pages and keys (used_memory)", format_size(redis.data_bytes))
    shown.add_row("maxmemory, at least", format_size(redis.maxmemory))
    shown.add_row("memory to give it", format_size(redis.host_bytes))
    if redis.total_bytes > redis.host_bytes:
        shown.add_row("memory to give all nodes", format_size(redis.total_bytes))
    return shown


def _caches(found: Plan) -> Table:
    from embedding_store.byte_sizes import format_size

    shown = _table("cache", "sidecar's memory", "rows", *_POLICIES.values(), "fetched a request")
    for cache in found.caches:
        rates = [f"{cache.rates[policy].raw:.1%}" for policy in _POLICIES]
        fetched = f"{cache.rates['s3fifo'].fetched_per_request:,.1f}"
        shown.add_row(format_size(cache.bytes), format_size(cache.sidecar_bytes), f"{cache.entries:,}", *rates, fetched)
    return shown


def _cache_sizes(found: Plan) -> Table:
    from embedding_store.byte_sizes import format_size

    shown = _table("hit rate", *_POLICIES.values())
    for sizes in found.cache_sizes:
        shown.add_row(f"{sizes.hit_rate:.0%}", *(format_size(sizes.bytes[policy]) for policy in _POLICIES))
    return shown
