"""`torchrank data`: writes the data sets that the project demonstrates and measures itself with."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def data() -> None:
    """Write the demonstration data sets."""


@data.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write; new or empty.")
@click.option("--users", default=3000, show_default=True)
@click.option("--items", default=2000, show_default=True)
@click.option("--days", default=10, show_default=True, help="The last is the test split, the one before it validation.")
@click.option("--rows-per-day", default=60_000, show_default=True, help="About so many; 4 to 10 rows are one request.")
@click.option("--seed", default=0, show_default=True, help="The same seed and sizes give the same bytes.")
def feed(output: Path, users: int, items: int, days: int, rows_per_day: int, seed: int) -> None:
    """A synthetic video feed: users, videos, histories, and the labels click and finish."""
    from torchrank.data.feed import generate_feed

    meta = generate_feed(output, users, items, days, rows_per_day, seed)
    rows = meta["rows"]
    best = ", ".join(f"{task} {value:.4f}" for task, value in meta["auc_best_reachable"]["test"].items() if value)
    click.echo(f"{output}: {sum(rows.values()):,} rows ({', '.join(f'{n} {rows[n]:,}' for n in rows)})")
    click.echo(f"best reachable test AUC: {best}")
    if not meta["created"]:
        click.echo("already there, with the same parameters; nothing was written")


@data.command()
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder with UCI's census-income.data and census-income.test, plain or .gz.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write; new or empty.")
@click.option("--seed", default=0, show_default=True, help="Which half of UCI's test file becomes validation.")
def census(source: Path, output: Path, seed: int) -> None:
    """UCI Census-Income with the tasks income and never_married."""
    from torchrank.data.census import write_census

    rows = write_census(source, output, seed)
    click.echo(f"{output}: {sum(rows.values()):,} rows ({', '.join(f'{n} {rows[n]:,}' for n in rows)})")
