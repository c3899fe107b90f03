"""`torchrank gc`: removes the releases that nobody needs any more from a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from torchrank.commands.store import store_option

if TYPE_CHECKING:
    from embedding_store.gc import Decision


@click.command()
@store_option
@click.option("--keep", type=click.IntRange(0), default=1, show_default=True,
              help="Per model, how many releases before the active one stay for rollback.")  # fmt: skip
@click.option("--grace", metavar="TIME", default="24h", show_default=True,
              help="What was published, active or worked on more lately stays: 90s, 30m, 24h, 7d.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Remove nothing, only say what would be.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line, instead of the table.")
def gc(store: str, keep: int, grace: str, dry_run: bool, as_json: bool) -> None:
    """Remove old releases, and publications that were given up, from a store.

    A release stays as long as it is active, among the last --keep before the active one, pinned by a sidecar that
    serves it, or younger than --grace. Interrupted, the same command goes on where it stopped.
    """
    import msgspec

    from embedding_store import gc as collecting
    from embedding_store.durations import parse_duration
    from embedding_store.open import open_backend

    seconds = parse_duration(grace)
    with open_backend(store) as backend:
        if dry_run:
            decisions = [decision for _, decision in collecting.plan(backend, keep=keep, grace=seconds)]
        else:
            decisions = collecting.collect(backend, keep=keep, grace=seconds)
        address = backend.address
    if as_json:
        click.echo(msgspec.json.encode({"store": address, "dry_run": dry_run, "releases": decisions}).decode())
    elif not decisions:
        click.echo(f"{address} has no releases")
    else:
        _print(address, decisions, dry_run)


def _print(address: str, decisions: list[Decision], dry_run: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from embedding_store.byte_sizes import format_size

    table = Table(title=address)
    table.add_column("release", overflow="fold")  # it is typed into other commands: never cut short
    table.add_column("state")
    table.add_column("size", justify="right")
    table.add_column("")
    table.add_column("why", overflow="fold")
    keep, remove = ("keep", "remove") if dry_run else ("kept", "removed")
    for decision in decisions:
        what = remove if decision.removed else keep
        table.add_row(decision.release, decision.state, format_size(decision.bytes), what, decision.reason)
    Console().print(table)
    gone = [decision for decision in decisions if decision.removed]
    size = format_size(sum(decision.bytes for decision in gone))
    click.echo(f"{'would remove' if dry_run else 'removed'} {len(gone)} of {len(decisions)}, {size}")
