"""Metrics of a run's best checkpoint on its test data.

`torchrun --nproc-per-node N -m -- torchrank.evaluate --run DIR` shards; without the `--`, torchrun takes `--run` for
an abbreviated option of its own.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchrank.training.distributed import process_group
from torchrank.training.load import load_run, scoring_device
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import find_run, strict_json, write_atomically


def evaluate(run_dir: Path | None, data: str | None, *, as_json: bool) -> None:
    """Prints the metrics per task, and writes them to RUN/evaluation.json."""
    quiet_libraries()
    run = find_run(run_dir)
    config = run.config()
    with process_group(scoring_device(config), config.training.threads) as ranks:
        loaded = load_run(run, ranks)
        metrics = loaded.metrics(loaded.source(data))
    if metrics is None:
        return
    text = strict_json(metrics)
    write_atomically(run.folder / "evaluation.json", text + "\n")
    if as_json:
        print(text)
        return
    table = Table("task", *next(iter(metrics.values())))
    for task, values in metrics.items():
        table.add_row(task, *(f"{value:.4f}" for value in values.values()))
    Console().print(table)


if __name__ == "__main__":
    from torchrank.commands.training import evaluate as command

    command()
