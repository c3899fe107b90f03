"""`torchrank train`, `evaluate` and `predict`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click


def find_own_modules() -> None:
    """A model of one's own may be a module in the working directory: `python -m` finds that, a console script not."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


run_option = click.option(
    "--run", "run_dir", type=click.Path(path_type=Path), help="A run's directory; by default the latest run."
)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED)
def train(overrides: tuple[str, ...]) -> None:
    """Train a model: Hydra overrides, as in `torchrank train +model=mmoe data=feed training.epochs=2`."""
    from torchrank.train import main

    find_own_modules()
    sys.argv = ["torchrank train", *overrides]
    main()


@click.command()
@run_option
@click.option("--data", help="Data of the run's form; by default its test data.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(run_dir: Path | None, data: str | None, as_json: bool) -> None:
    """AUC, logloss, calibration (predicted over observed) and, where there are users, GAUC, per task."""
    from torchrank.evaluate import evaluate

    find_own_modules()
    evaluate(run_dir, data, as_json=as_json)


@click.command()
@run_option
@click.option("--data", required=True, help="Data of the run's form; needs no labels.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The Parquet file to write.")
@click.option("--keep", multiple=True, help="A column to write beside the scores (repeatable); by default all.")
def predict(run_dir: Path | None, data: str, output: Path, keep: tuple[str, ...]) -> None:
    """Write a probability per task, `score_TASK`, beside the columns of a data set."""
    from torchrank.predict import predict

    find_own_modules()
    rows = predict(run_dir, data, output, keep or None)
    click.echo(f"{output}: {rows:,} rows", err=True)
