"""Stopping and going on: the next losses are those of a training that was never interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig

from tests.tiny import make_rows
from torchrank.train import train
from torchrank.training.run import Run

Composed = Callable[..., DictConfig]
CONF = Path(__file__).parent / "conf"
KINDS = ("row_wise", "data_parallel")


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [40, 25], ids=["in the second epoch", "in the first epoch"])
def test_resumed_losses_equal_uninterrupted_ones(composed: Composed, tmp_path: Path, kind: str, stop: int) -> None:
    """4096 rows are 32 steps an epoch; dropout makes the random state matter."""
    common = (f"sharding={kind}", "model.dropout=0.2", "training.epochs=3", "training.validation_rows=200")
    train(composed(*common, "training.max_steps=60", run="whole"))
    train(composed(*common, f"training.max_steps={stop}", run="parts"))
    assert max(losses(tmp_path / "parts")) == stop
    train(composed(*common, "training.max_steps=60", "resume=true", run="parts"))
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert sorted(parts) == list(range(1, 61))
    steps = range(stop + 1, stop + 21)
    np.testing.assert_allclose([parts[s] for s in steps], [whole[s] for s in steps], atol=1e-6, rtol=0)


def test_resume_of_another_model_is_refused(composed: Composed) -> None:
    train(composed("training.max_steps=2"))
    for name, override in {
        "model": "model.experts=3",
        "seed": "seed=7",
        "training.shuffle": "training.shuffle=false",
    }.items():
        with pytest.raises(ValueError, match=f"resume=true: {name} is not what run .* was started with"):
            train(composed("training.max_steps=4", "resume=true", override))


def test_a_run_is_never_overwritten(composed: Composed) -> None:
    train(composed("training.max_steps=1"))
    with pytest.raises(ValueError, match="already holds a run: choose another, or continue that one with resume=true"):
        train(composed("training.max_steps=1"))


def test_early_stopping_keeps_the_best_checkpoint(composed: Composed, tmp_path: Path) -> None:
    """A learning rate of 0 never gets better than the first validation."""
    frozen = (
        "optimizer.dense.lr=0",
        "optimizer.tables.lr=0",
        "training.validate_every=2",
        "training.validation_rows=300",
    )
    progress = train(composed(*frozen, "training.early_stopping.patience=3", "training.keep_checkpoints=1"))
    assert (progress.step, progress.best_step) == (8, 2)
    run = Run(tmp_path / "run")
    assert run.checkpoint().name == "step-2"
    assert sorted(path.name for path in run.checkpoints.glob("step-*")) == ["step-2", "step-8"]


def entry_point(data: Path, run: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    arguments = [
        *("torchrank.train", "--config-dir", str(CONF), "data=tiny", f"data.path={data}", "+model=mmoe"),
        *(f"run_dir={run}", "training.batch_size=128", "training.log_every=1", "training.threads=1"),
    ]
    return subprocess.Popen(
        [*launch, *arguments, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run.parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        process.terminate()  # torchrun ends its workers
        process.wait()
    return process.returncode, output


def test_sigterm_saves_and_exits_0(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = entry_point(tiny_data, run, "training.epochs=1000", "training.validation_rows=100")
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 3:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    newest = Run(run).newest_checkpoint()
    assert newest is not None
    assert json.loads((newest / "progress.json").read_text())["step"] == max(losses(run))


def test_torchrun_shards_and_resumes(tiny_data: Path, tmp_path: Path) -> None:
    """The real entry point on two ranks; stopped and resumed, it goes on where it was."""
    run = tmp_path / "run"
    for overrides in (("training.max_steps=10",), ("training.max_steps=16", "resume=true")):
        code, output = finish(
            entry_point(tiny_data, run, "sharding=row_wise", "training.validation_rows=100", *overrides, ranks=2)
        )
        assert code == 0, output
    assert "resumed from step-10" in output
    assert sorted(losses(run)) == list(range(1, 17))
    plan = {table["table"]: table for table in json.loads((run / "plan.json").read_text())}
    assert [shard["rank"] for shard in plan["user_id"]["shards"]] == [0, 1]
    assert (tmp_path / "outputs" / "latest_run").read_text().strip() == str(run)


def test_user_errors_are_one_line(tiny_data: Path, tmp_path: Path) -> None:
    for override, expected in {
        "training.batch_siz=3": "training has no key 'batch_siz'; did you mean 'batch_size'? It has: epochs,",
        "trainign.epochs=3": "the configuration has no key 'trainign'; did you mean 'training'? It has: model, data,",
        "+sharding.tables.nope=row_wise": "sharding.tables names 'nope'; the tables are: hour, item_id",
        "model.expert=3": "model has no key 'expert'; did you mean 'experts'? It has: _target_, experts, expert_hidden",
        "optimizer.tables.name=adam": "sgd, adagrad, rowwise_adagrad",
    }.items():
        code, output = finish(entry_point(tiny_data, tmp_path / "run", override))
        assert code == 1
        assert expected in output, output
        assert "Traceback" not in output, output


def test_ranks_with_unequal_last_batches(tmp_path: Path) -> None:
    """1001 rows on two ranks: 501 and 500, so the last batches differ by a row, in training and in validation."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid"):
        pq.write_table(make_rows(1001, seed=3), data / f"{name}.parquet")
    code, output = finish(
        entry_point(data, tmp_path / "run", "sharding=row_wise", "training.epochs=2", "tensorboard=false", ranks=2)
    )
    assert code == 0, output
    assert len(losses(tmp_path / "run")) == 16
