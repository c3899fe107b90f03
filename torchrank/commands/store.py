"""`torchrank publish | releases | activate | rollback | gc`: what lies in a store, and what of it is served."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torchrank.commands.progress_bar import shown_progress

if TYPE_CHECKING:
    from embedding_store.publish import Published
    from embedding_store.releases import ReleaseState

store_option = click.option(
    "--store", metavar="URL", required=True,
    help="memmap://DIR, redis://HOST:PORT/DB, rediss:// over TLS, redis+unix:///PATH, redis+cluster://HOST:PORT,…",
)  # fmt: skip

rate_limit_option = click.option(
    "--rate-limit", metavar="SIZE",
    help="At most so much a second, written and read back together, as in 50MiB.  [default: none]",
)  # fmt: skip


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@store_option
@click.option(
    "--activate", "activates", is_flag=True,
    help="Make it the active release of its model as well, unless somebody else activates one meanwhile.",
)  # fmt: skip
@rate_limit_option
def publish(bundle: Path, store: str, activates: bool, rate_limit: str | None) -> None:
    """Copy a bundle's tables into a store as a new release, read them back, and only then make it visible.

    First it looks whether the store will take them, and says what to set where it will not. After an interruption the
    same command goes on where it stopped; the active release is untouched until --activate or `torchrank activate`.

    Where the release is complete already, it looks whether every page is there and has its length, and writes again
    what was lost. `torchrank verify` compares the contents too.
    """
    from embedding_store import publish as publishing
    from embedding_store.byte_sizes import parse_size
    from embedding_store.open import open_backend

    bytes_per_second = None if rate_limit is None else parse_size(rate_limit)
    began = time.monotonic()
    with open_backend(store) as backend:
        with shown_progress("publishing") as show:
            if activates:
                published, before = publishing.publish_and_activate(
                    bundle, backend, bytes_per_second=bytes_per_second, progress=show
                )
            else:
                published = publishing.publish(bundle, backend, bytes_per_second=bytes_per_second, progress=show)
        name = published.manifest.name
        for damage in published.mended:
            click.echo(f"mended {damage}")
        click.echo(f"{name}: {_outcome(published)} in {backend.address}; {time.monotonic() - began:.1f} s")
        if activates:
            click.echo(_activated(name, before))
        elif backend.active(published.manifest.model) == name:
            click.echo(f"{name} is active")
        else:
            click.echo(f"not active yet: torchrank activate {name} --store …")


def _outcome(published: Published) -> str:
    tables = published.manifest.tables
    if published.new:
        return f"{len(tables)} tables, {sum(table.bytes + table.ids_bytes for table in tables):,} bytes, verified"
    if published.mended:
        return "compared with the bundle, mended and whole"
    return "complete already, all pages there (torchrank verify compares what is in them)"


@click.command()
@store_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line, instead of the table.")
def releases(store: str, as_json: bool) -> None:
    """List the releases of a store, and what else takes room there.

    idle: how long it has not been the active one. pins: how many sidecars serve it; --json names them.
    """
    import msgspec

    from embedding_store.open import open_backend
    from embedding_store.releases import list_releases

    with open_backend(store) as backend:
        found = list_releases(backend)
        address = backend.address
    if as_json:
        click.echo(msgspec.json.encode({"store": address, "releases": found}).decode())
        return
    if not found:
        click.echo(f"{address} has no releases yet: torchrank publish BUNDLE --store …")
        return

    from rich.console import Console
    from rich.table import Table

    from embedding_store.byte_sizes import format_size
    from embedding_store.durations import format_duration

    table = Table(title=address)
    table.add_column("release", overflow="fold")  # it is typed into other commands: never cut short
    table.add_column("state")
    table.add_column("created (UTC)", overflow="fold")
    for heading in ("rows", "size", "idle", "pins"):
        table.add_column(heading, justify="right")
    for state in found:
        sizes = (f"{state.rows:,}", format_size(state.bytes)) if state.tables else ("", "")
        idle = "" if state.active or state.state == "removing" else format_duration(state.idle_seconds)
        pins = f"{len(state.pinned_by)}" if state.pinned_by else ""
        table.add_row(state.name, _state(state), _to_the_minute(state.created), *sizes, idle, pins)
    Console().print(table)


def _state(state: ReleaseState) -> str:
    if state.active:
        return "active"
    return "publishing" if state.publisher else state.state


def _to_the_minute(created: str) -> str:
    """2026-01-31T12:34:56+00:00 -> 2026-01-31 12:34"""
    return created[:16].replace("T", " ")


@click.command()
@click.argument("release")
@store_option
def activate(release: str, store: str) -> None:
    """Make RELEASE (MODEL@VERSION) the active one of its model."""
    from embedding_store import releases
    from embedding_store.open import open_backend

    with open_backend(store) as backend:
        click.echo(_activated(release, releases.activate(backend, release)))


@click.command()
@click.argument("model")
@store_option
def rollback(model: str, store: str) -> None:
    """Return to the release of MODEL that was active before; again, to the one before that."""
    from embedding_store import releases
    from embedding_store.open import open_backend

    with open_backend(store) as backend:
        left, now = releases.rollback(backend, model)
    click.echo(f"{now} is active again; it was {left}")


def _activated(release: str, before: str | None) -> str:
    if before == release:
        return f"{release} was active already"
    return f"{release} is active; before: {before or 'none'}"
