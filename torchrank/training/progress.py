"""What a person sees of a training: a progress bar, the run's metrics.jsonl, TensorBoard. First rank only."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from torchrank.training import metrics
from torchrank.training.run import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_WINDOW_ROWS = 65_536


class RecentAUC:
    """AUC per task over the last rows that were trained on, each scored before its update."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks
        self._batches: deque[tuple[Tensor, Tensor]] = deque()
        self._rows = 0

    def add(self, labels: Tensor, logits: Tensor) -> None:
        """Both float32 [N, tasks]; they stay on their device, so that a step waits for no copy."""
        self._batches.append((labels, logits))
        self._rows += len(labels)
        while self._rows - len(self._batches[0][0]) >= _WINDOW_ROWS:
            self._rows -= len(self._batches.popleft()[0])

    def values(self) -> dict[str, float]:
        """Empty before the first rows."""
        if not self._batches:
            return {}
        labels, logits = (torch.cat(parts).cpu().numpy() for parts in zip(*self._batches, strict=True))
        return {task: metrics.auc(labels[:, k], logits[:, k]) for k, task in enumerate(self.tasks)}


class Reporter:
    """One line and bar on a terminal; plain lines elsewhere, so that a log file stays readable."""

    def __init__(self, run: Run, *, tensorboard: bool, console: Console | None = None) -> None:
        self.run = run
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),  # what the terminal's width leaves
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._tensorboard = tensorboard
        self._board: SummaryWriter | None = None

    def begin(self, step: int) -> None:
        """`step`: how far the training has come, 0 but for a resumed one. Whatever was logged after it is dropped."""
        self.run.forget_after(step)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=step + 1)

    def begin_epoch(self, epoch: int, epochs: int, steps: int, done: int) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, status="")
        self._bar.reset(self._task, total=steps, completed=done, description=f"epoch {epoch + 1}/{epochs}", status="")

    def step(self) -> None:
        if self._task is not None:
            self._bar.advance(self._task)

    def train(self, step: int, loss: float, aucs: Mapping[str, float], samples_per_s: float) -> None:
        if self._task is not None:
            shown = " ".join(f"{task} {value:.3f}" for task, value in aucs.items())
            speed = f"{samples_per_s:,.0f}" if samples_per_s < 10_000 else f"{samples_per_s / 1000:,.0f}k"
            self._bar.update(self._task, status=f"loss {loss:.3f} AUC {shown} {speed}/s")  # two tasks: 80 columns
        if not self.console.is_terminal:
            shown = " ".join(f"auc.{task} {value:.4f}" for task, value in aucs.items())
            self.console.print(f"step {step} loss {loss:.4f} {shown} {samples_per_s:,.0f}/s", highlight=False)
        scalars = {"loss": loss, "samples_per_s": samples_per_s, **{f"auc.{task}": v for task, v in aucs.items()}}
        self._record("train", step, scalars)

    def validation(self, step: int, results: Mapping[str, Mapping[str, float]], *, best: bool) -> None:
        scalars = {f"{name}.{task}": value for task, values in results.items() for name, value in values.items()}
        shown = " ".join(f"{key} {value:.4f}" for key, value in scalars.items() if key.startswith("auc."))
        self.console.print(f"step {step} validation {shown}{' (best)' if best else ''}", highlight=False)
        self._record("validation", step, scalars)

    def note(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def close(self) -> None:
        self._bar.stop()
        if self._board is not None:
            self._board.close()

    def _record(self, kind: str, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log({"kind": kind, "step": step, **scalars})
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
