"""python -m torchrank.train +model=NAME [key=value …]; `torchrun --nproc-per-node N -m torchrank.train …` shards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from torchrank.cli import for_the_user
from torchrank.config_dir import config_dir
from torchrank.training.checkpoint import Progress
from torchrank.training.config import Config, check
from torchrank.training.distributed import Ranks, process_group
from torchrank.training.module import build, feature_schema
from torchrank.training.progress import Reporter
from torchrank.training.quiet import quiet_libraries
from torchrank.training.run import Run, dated_run, find_run, typed
from torchrank.training.sharding import describe
from torchrank.training.targets import build_target
from torchrank.training.trainer import Trainer
from torchrank.training.unknown_keys import unknown_keys

ConfigStore.instance().store(name="schema", node=Config)


def train(composed: DictConfig) -> Progress:
    """One training, from a composed configuration to the run's last checkpoint."""
    quiet_libraries()
    config = typed(composed)
    check(config)
    feature_schema(config)  # a wrong model or feature is told before any data is made
    with process_group(config.device, config.training.threads) as ranks:
        return train_on(ranks, config, composed)


def train_on(ranks: Ranks, config: Config, composed: DictConfig) -> Progress:
    """Collective: the same, by processes that have found each other already."""
    run = _run(config, composed, ranks)
    ranks.on_first(lambda: _generate_missing(config))
    built = build(config, ranks)
    reporter = Reporter(run, tensorboard=config.tensorboard) if ranks.is_first else None
    try:
        if reporter:
            _report_plan(run, reporter, describe(built.sharded))
        trainer = Trainer(config, run, built, ranks, reporter)
        if config.resume:
            trainer.resume()
        progress = trainer.train()
        if reporter:
            reporter.note(f"run {run.folder}, step {progress.step}")
    finally:
        if reporter:
            reporter.close()
    return progress


def _run(config: Config, composed: DictConfig, ranks: Ranks) -> Run:
    """The run's directory, one for all ranks; made by the first."""
    if config.resume:
        run = find_run(config.run_dir)
        _check_same(run, config)
        return run
    name = [str(config.run_dir or dated_run().folder)]
    ranks.broadcast(name)
    run = Run(Path(name[0]))
    ranks.on_first(lambda: run.create(composed))
    return run


def _check_same(run: Run, config: Config) -> None:
    """What the parameters mean, and in which order the rows come, cannot change in the middle of a training."""
    started = run.config()
    for name, then, now in (
        ("model", started.model, config.model),
        ("data.features", started.data.features, config.data.features),
        ("data.labels", started.data.labels, config.data.labels),
        ("data.train", started.data.train, config.data.train),
        ("training.shuffle", started.training.shuffle, config.training.shuffle),
        ("seed", started.seed, config.seed),
    ):
        if then != now:
            raise ValueError(f"resume=true: {name} is not what run {run.folder} was started with")


def _generate_missing(config: Config) -> None:
    if config.data.generate is not None and not Path(config.data.path).exists():
        build_target("data.generate", config.data.generate)


def _report_plan(run: Run, reporter: Reporter, plan: list[dict[str, Any]]) -> None:
    (run.folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    for table in plan:
        shards = ", ".join(f"rank {s['rank']}: {s['size'][0]}x{s['size'][1]}" for s in table["shards"])
        reporter.note(
            f"table {table['table']}: {table['sharding']}, {table['kernel']}; {shards or 'a copy on every rank'}"
        )


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")
def _main(composed: DictConfig) -> None:
    try:
        train(composed)
    except Exception as error:
        message = for_the_user(error)
        if message is None:
            raise
        print(f"Error: {message}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """Hydra's command line, and what its errors leave out."""
    try:
        _main()
    except SystemExit as end:
        if end.code:
            for line in unknown_keys(sys.argv[1:]):
                print(line, file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
