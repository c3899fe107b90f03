"""What a person sees of a training: the bar on a terminal, plain lines elsewhere, TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from rich.console import Console
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchrank.train import train
from torchrank.training import progress
from torchrank.training.progress import RecentAUC, Reporter
from torchrank.training.run import Run

Composed = Callable[..., DictConfig]


def test_the_bar_fits_into_80_columns(tmp_path: Path) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=80, color_system=None)
    reporter = Reporter(Run(tmp_path), tensorboard=False, console=console)
    reporter.begin_epoch(0, 3, 512, 100)
    for _ in range(200):
        reporter.step()
    reporter.train(300, 0.61234, {"click": 0.71234, "finish": 0.68123}, 123456.7)
    reporter.close()
    last = terminal.getvalue().split("\r")[-1]
    for part in ("epoch 1/3", "300/512", "loss 0.612 AUC click 0.712 finish 0.681", "123k/s", "00:0"):
        assert part in last


def test_the_bar_counts_every_step(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=terminal, force_terminal=True, width=120, color_system=None)
    )
    train(composed("training.max_steps=7", "training.validation_rows=100", "training.log_every=3"))
    assert "7/32" in terminal.getvalue().split("\r")[-1]


def test_recent_auc_is_that_of_the_last_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_WINDOW_ROWS", 50)
    recent = RecentAUC(("a", "b"))
    assert recent.values() == {}
    rng = np.random.default_rng(3)
    labels = (rng.random((120, 2)) < 0.4).astype(np.float32)
    logits = rng.normal(size=(120, 2)).astype(np.float32)
    for begin in range(0, 120, 20):
        recent.add(torch.from_numpy(labels[begin : begin + 20]), torch.from_numpy(logits[begin : begin + 20]))
    expected = [roc_auc_score(labels[-60:, k], logits[-60:, k]) for k in range(2)]  # the fewest batches with 50 rows
    assert list(recent.values().values()) == pytest.approx(expected)


def test_tensorboard_has_what_metrics_jsonl_has(composed: Composed, tmp_path: Path) -> None:
    train(composed("training.max_steps=4", "training.validation_rows=200", "tensorboard=true"))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    tags = set(board.Tags()["scalars"])
    assert tags >= {
        "train/loss",
        "train/samples_per_s",
        "train/auc.click",
        "validation/auc.click",
        "validation/gauc.click",
    }
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4]
    found = [event.value for event in board.Scalars("train/loss")]
    assert found == pytest.approx([record["loss"] for record in Run(tmp_path / "run").records("train")], rel=1e-6)


def test_what_was_logged_behind_the_last_checkpoint_is_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3, 4):
        run.log({"kind": "train", "step": step, "loss": 0.5})
    run.log({"kind": "validation", "step": 2, "auc.click": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "train", "st')  # killed while writing
    run.forget_after(2)
    run.log({"kind": "train", "step": 3, "loss": 0.4})
    assert [record["step"] for record in run.records("train")] == [1, 2, 3]
    assert run.records("validation") == [{"kind": "validation", "step": 2, "auc.click": None}]  # JSON has no NaN
