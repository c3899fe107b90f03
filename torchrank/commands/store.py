"""`torchrank publish | releases | activate | rollback`: what lies in a store, and what of it is served."""

from __future__ import annotations

from pathlib import Path

import click

store_option = click.option(
    "--store", metavar="URL", required=True, help="memmap://DIR, redis://HOST:PORT/DB, redis+unix:///PATH."
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@store_option
@click.option("--activate", "activates", is_flag=True, help="Make it the active release of its model as well.")
def publish(bundle: Path, store: str, activates: bool) -> None:
    """Copy a bundle's tables into a store as a new release, read them back, and only then make it visible.

    After an interruption the same command goes on where it stopped; the active release is untouched until --activate
    or `torchrank activate`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from embedding_store import publish as publishing
    from embedding_store import releases
    from embedding_store.open import open_backend

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with open_backend(store) as backend:
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("publishing", total=None)

            def show(step: str, done: int, total: int) -> None:
                bar.update(task, description=step, completed=done, total=total)

            manifest = publishing.publish(bundle, backend, progress=show)
        size = sum(table.bytes for table in manifest.tables)
        click.echo(f"{manifest.name}: {len(manifest.tables)} tables, {size:,} bytes, verified in {backend.address}")
        if activates:
            click.echo(_activated(manifest.name, releases.activate(backend, manifest.name)))
        else:
            click.echo(f"not active yet: torchrank activate {manifest.name} --store …")


@click.command()
@store_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line, instead of the table.")
def releases(store: str, as_json: bool) -> None:
    """List the releases of a store, and which is active."""
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

    table = Table(title=address)
    table.add_column("release", overflow="fold")  # it is typed into other commands: never cut short
    table.add_column("state")
    table.add_column("created (UTC)", overflow="fold")
    for heading in ("tables", "rows", "bytes"):
        table.add_column(heading, justify="right")
    for state in found:
        sizes = (f"{state.tables:,}", f"{state.rows:,}", f"{state.bytes:,}") if state.tables else ("", "", "")
        table.add_row(state.name, "active" if state.active else state.state, _to_the_minute(state.created), *sizes)
    Console().print(table)


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
