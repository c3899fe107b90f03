"""`torchrank verify`: whether a store still has what was published."""

from __future__ import annotations

from pathlib import Path

import click

from torchrank.commands.progress_bar import shown_progress
from torchrank.commands.store import rate_limit_option, store_option


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@store_option
@click.option("--mend", "mends", is_flag=True, help="Write what differs again; those who read may go on.")
@rate_limit_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line, instead of the list.")
@click.pass_context
def verify(
    context: click.Context, bundle: Path, store: str, mends: bool, rate_limit: str | None, as_json: bool
) -> None:
    """Compare every byte of a complete release in a store with its BUNDLE, and list what was lost or changed.

    Exits with 1 where something was, and --mend did not write it again. Sidecars and services neither answer nor cache
    lost or changed rows; they find them again as they are written, and need no restart.
    """
    import msgspec

    from embedding_store import mend as mending
    from embedding_store.bundle import read_release_manifest
    from embedding_store.byte_sizes import parse_size
    from embedding_store.open import open_backend

    bytes_per_second = None if rate_limit is None else parse_size(rate_limit)
    name = read_release_manifest(bundle).name
    with open_backend(store) as backend, shown_progress("comparing") as show:
        go_through = mending.mend if mends else mending.check
        damaged = go_through(bundle, backend, bytes_per_second=bytes_per_second, progress=show)
        address = backend.address
    if as_json:
        answer = {"store": address, "release": name, "damaged": damaged, "whole": mends or not damaged}
        click.echo(msgspec.json.encode(answer).decode())
    else:
        for damage in damaged:
            click.echo(f"mended {damage}" if mends else damage)
        click.echo(f"{name}: {_outcome(bool(damaged), mends)} in {address}")
    context.exit(1 if damaged and not mends else 0)


def _outcome(damaged: bool, mends: bool) -> str:
    if not damaged:
        return "every byte is as published"
    if mends:
        return "compared with the bundle, mended and whole"
    return "damaged (torchrank verify --mend writes it again)"
