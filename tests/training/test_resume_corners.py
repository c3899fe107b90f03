"""Where a training can be interrupted that is not in the middle of an epoch, and what a resumed one keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig

from tests.tiny import make_rows, train_on_ranks
from torchrank.train import train
from torchrank.training.metrics import mean_auc
from torchrank.training.run import Run, find_run

Composed = Callable[..., DictConfig]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in Run(run).records("train")]


def test_resume_behind_a_kill_repeats_the_lost_steps_once(composed: Composed, tmp_path: Path) -> None:
    common = ("training.checkpoint_every=4", "training.validation_rows=100")
    train(composed(*common, "training.max_steps=9"))
    run = Run(tmp_path / "run")
    before = losses(run.folder)
    newest = run.newest_checkpoint()
    assert newest is not None
    (run.checkpoints / ".step-11.tmp").mkdir()  # as a kill -9 while saving leaves it
    newest.rename(tmp_path / "lost")  # as if step 9 had never been saved
    (run.checkpoints / "best").unlink()
    train(composed(*common, "training.max_steps=9", "resume=true"))
    after = losses(run.folder)
    assert [step for step, _ in after] == list(range(1, 10))
    np.testing.assert_allclose([loss for _, loss in after], [loss for _, loss in before], atol=1e-6, rtol=0)
    assert not list(run.checkpoints.glob(".*"))


def test_resume_of_a_finished_run_changes_nothing(composed: Composed, tmp_path: Path) -> None:
    short = ("training.epochs=1", "training.validation_rows=100", "training.batch_size=1024")
    first = train(composed(*short))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert train(composed(*short, "resume=true")) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_resume_without_a_checkpoint_starts(composed: Composed, tmp_path: Path) -> None:
    configuration = composed("training.max_steps=2", "training.validation_rows=100")
    Run(tmp_path / "run").create(configuration)
    Run(tmp_path / "run").log({"kind": "train", "step": 1, "loss": 9.0})
    assert train(composed("training.max_steps=2", "training.validation_rows=100", "resume=true")).step == 2
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]


def test_a_validation_behind_the_checkpoint_of_its_step_is_kept(composed: Composed, tmp_path: Path) -> None:
    progress = train(composed("training.max_steps=4", "training.checkpoint_every=4", "training.validation_rows=300"))
    saved = json.loads((tmp_path / "run/checkpoints/step-4/progress.json").read_text())
    assert (saved["best_step"], saved["validated_step"]) == (4, 4)
    assert saved["best"] == progress.best


def test_the_run_is_the_latest_from_its_first_checkpoint_on(composed: Composed, tmp_path: Path) -> None:
    """So that `resume=true` alone continues a run that was killed."""
    with pytest.raises(ValueError, match="nowhere"):
        train(composed("training.max_steps=4", "training.checkpoint_every=2", "data.valid.path=nowhere"))
    assert find_run(None).folder == tmp_path / "run"


def test_optimizer_state_that_a_checkpoint_lacks_is_told(
    composed: Composed, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("training.validation_rows=100", "training.max_steps=2")
    train(composed("sharding=row_wise", *common))
    assert "start anew" not in capsys.readouterr().err
    train(composed("sharding=table_wise", *common, "resume=true"))
    assert "start anew" not in capsys.readouterr().err
    train(composed("sharding=row_wise", "+sharding.tables.user_id=data_parallel", *common, "resume=true"))
    assert "parts of their state start anew, replicated_optimizer." in " ".join(capsys.readouterr().err.split())


def test_two_ranks_resume_where_one_has_no_rows_left(tmp_path: Path) -> None:
    """513 rows: 256 for rank 0, which are 4 batches, and 257 for rank 1, which are 5. Interrupted behind the fourth."""
    pq.write_table(make_rows(513, seed=5), tmp_path / "train.parquet")
    pq.write_table(make_rows(100, seed=6), tmp_path / "valid.parquet")
    run = tmp_path / "run"
    common = ("+model=mmoe", "sharding=row_wise", "training.epochs=1")
    train_on_ranks(2, tmp_path, run, *common, "training.max_steps=4")
    train_on_ranks(2, tmp_path, run, *common, "resume=true")
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5]


def test_fewer_rows_than_ranks_is_one_error(tmp_path: Path) -> None:
    pq.write_table(make_rows(1, seed=5), tmp_path / "train.parquet")
    pq.write_table(make_rows(100, seed=6), tmp_path / "valid.parquet")
    with pytest.raises(AssertionError, match=r"Error: there are fewer training rows than ranks \(2\)"):
        train_on_ranks(2, tmp_path, tmp_path / "run", "+model=mmoe")


def test_what_fails_on_the_first_rank_is_told_by_all(tmp_path: Path) -> None:
    """Else the other ranks' broken connections would bury it."""
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(AssertionError) as failed:
        train_on_ranks(2, tmp_path, tmp_path, "+model=mmoe")
    lines = [line for line in str(failed.value).splitlines() if "already holds a run: choose another" in line]
    assert len(lines) in (1, 2)  # torchrun ends the other rank when one has failed, at times before it could say so
    assert "Connection closed" not in str(failed.value)


def test_a_task_without_positives_does_not_hide_the_best(composed: Composed) -> None:
    nan = float("nan")
    assert mean_auc({"a": {"auc": 0.6}, "b": {"auc": nan}}) == 0.6
    assert math.isnan(mean_auc({"b": {"auc": nan}}))
    progress = train(
        composed(
            "training.max_steps=4", "training.validate_every=2", "training.validation_rows=1", "training.batch_size=1"
        )
    )
    assert (progress.best, progress.best_step) == (None, None)  # one row has no AUC


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.log_every=0", "training.log_every=0: accepted are whole numbers from 1 on"),
        ("training.validation_rows=0", "training.validation_rows=0: accepted are whole numbers from 1 on"),
        ("+training.task_weights.clik=2", "training.task_weights names 'clik'; the tasks are: click, finish"),
        ("data.valid=null training.early_stopping.patience=1", "patience needs validations, but data.valid is null"),
    ],
)
def test_settings_that_cannot_be_meant(composed: Composed, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(composed(*override.split()))
