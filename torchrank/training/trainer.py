"""The training loop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchrank.data.loader import Batch, Loader
from torchrank.data.source import Source
from torchrank.data.torch_batch import TorchBatch, to_torch
from torchrank.features.transform import FeatureTransform
from torchrank.training.checkpoint import Progress, keep_checkpoints, load_checkpoint, mark_best, save_checkpoint
from torchrank.training.config import Config
from torchrank.training.distributed import Ranks
from torchrank.training.metrics import mean_auc
from torchrank.training.module import Built
from torchrank.training.progress import RecentAUC, Reporter
from torchrank.training.run import Run
from torchrank.training.scoring import score_source
from torchrank.training.targets import build_target


@dataclass
class Since:
    """Sums over this rank's rows since the last log line."""

    loss: Tensor
    rows: int
    started: float


class Trainer:
    """Collective: every rank makes one and calls `train`."""

    def __init__(self, config: Config, run: Run, built: Built, ranks: Ranks, reporter: Reporter | None) -> None:
        """reporter: on the first rank only."""
        self.config, self.run, self.built, self.ranks, self.reporter = config, run, built, ranks, reporter
        self.settings = config.training
        if self.settings.batch_size % ranks.world_size:
            raise ValueError(
                f"training.batch_size={self.settings.batch_size} does not divide over {ranks.world_size} ranks"
            )
        self.loader = self._loader(config.data.train, shuffle=self.settings.shuffle)
        if not self.loader.common_batches:
            raise ValueError(f"there are fewer training rows than ranks ({ranks.world_size})")
        self.validation = self._loader(config.data.valid, shuffle=False) if config.data.valid else None
        weights = [self.settings.task_weights.get(task, 1.0) for task in built.schema.tasks]
        self.task_weights = torch.tensor(weights, device=ranks.device)
        self.progress = Progress(rows_read=[0] * ranks.world_size)
        self.recent = RecentAUC(built.schema.tasks)
        self.stop = False  # SIGTERM came

    def resume(self) -> None:
        """Goes on where the run's newest checkpoint stands, or starts where there is none."""
        folder = self.run.newest_checkpoint()
        if folder is None:
            return
        self.progress, absent = load_checkpoint(folder, self.built.sharded, self.built.optimizers, self.ranks)
        if absent:
            self._note(
                f"{folder.name} was written with other optimizers or another sharding: {len(absent)} parts of their "
                f"state start anew, {absent[0]} for one"
            )
        if len(self.progress.rows_read) != self.ranks.world_size:
            self._note(
                f"{folder.name} was written by {len(self.progress.rows_read)} ranks, now there are "
                f"{self.ranks.world_size}: epoch {self.progress.epoch + 1} starts again from its first row"
            )
            self.progress.rows_read = [0] * self.ranks.world_size
        if self.ranks.is_first and self.progress.best_step == self.progress.step:
            mark_best(self.run, folder)  # the training may have been killed before it could
        self._note(f"resumed from {folder.name}")

    def train(self) -> Progress:
        """Until the epochs, the steps or the patience are used up, or SIGTERM comes. Ends with a checkpoint."""
        if self.reporter:
            self.reporter.begin(self.progress.step)
        with _sigterm_sets(self):
            while self.progress.epoch < self.settings.epochs and not self._finished():
                if self._epoch():
                    self.progress.epoch += 1
                    self.progress.rows_read = [0] * self.ranks.world_size
                    if self.settings.validate_every is None:
                        self._validate()
                        self._save()
            if not self.ranks.largest(int(self.stop)):  # whoever sends SIGTERM does not want to wait
                self._validate()
        self._save()
        return self.progress

    def _epoch(self) -> bool:
        """True where the epoch was trained to its end."""
        skip = self.progress.rows_read[self.ranks.rank]
        done = self.ranks.largest(-(-skip // self._rank_batch))
        steps = done + self.ranks.largest(-(-(self.loader.rows - skip) // self._rank_batch))
        if self.reporter:
            self.reporter.begin_epoch(self.progress.epoch, self.settings.epochs, steps, done)
        spare: TorchBatch | None = None
        since = self._since()
        with closing(self.loader.epoch(self.progress.epoch, skip=skip)) as batches:
            for _ in range(done, steps):
                if self._finished():
                    return False
                batch = next(batches, None)
                spare = self._on_device(batch, spare)
                self._step(spare, since)
                self._count(batch)
                if self.progress.step % self.settings.log_every == 0:
                    since = self._log(since)
                self._between_steps()
        return True

    def _on_device(self, batch: Batch | None, spare: TorchBatch | None) -> TorchBatch:
        """A rank without a batch repeats its last one with weight 0: the others' look-ups and gradients need it."""
        if batch is not None:
            return self._converted(batch)
        return (spare or self._converted(self._last_batch())).without_weight()

    def _converted(self, batch: Batch) -> TorchBatch:
        rows = self.loader.batch_size
        return to_torch(batch.features, batch.labels, self.built.schema, rows).to(self.ranks.device)

    def _last_batch(self) -> Batch:
        """Of this rank's epoch: a training may be resumed where this rank's rows are used up and another's are not."""
        skip = (self.loader.batches - 1) * self._rank_batch
        with closing(self.loader.epoch(self.progress.epoch, skip=skip)) as batches:
            return next(batches)

    def _step(self, batch: TorchBatch, since: Since) -> None:
        logits = self.built.sharded(batch)
        losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none").mean(dim=0)
        loss = (losses * self.task_weights).sum() * batch.weight
        for optimizer in self.built.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # updates the sharded tables too
        for optimizer in self.built.optimizers.values():
            optimizer.step()
        since.loss += loss.detach() * batch.rows
        since.rows += batch.rows if batch.weight else 0
        if self.reporter and batch.weight:
            self.recent.add(batch.labels, logits.detach())

    def _count(self, batch: Batch | None) -> None:
        self.progress.step += 1
        if batch is not None:
            self.progress.rows_read[self.ranks.rank] = batch.rows_read
        if self.reporter:
            self.reporter.step()

    def _between_steps(self) -> None:
        step = self.progress.step
        if self.settings.validate_every and step % self.settings.validate_every == 0:
            self._validate()
            self._save()
        elif self.settings.checkpoint_every and step % self.settings.checkpoint_every == 0:
            self._save()

    def _finished(self) -> bool:
        """The same answer on every rank."""
        patience = self.settings.early_stopping.patience
        if patience and self.progress.validations_since_best >= patience:
            return True
        if self.settings.max_steps is not None and self.progress.step >= self.settings.max_steps:
            return True
        return bool(self.ranks.largest(int(self.stop)))

    def _validate(self) -> None:
        if self.validation is None or self.progress.validated_step == self.progress.step:
            return
        rows = self.settings.validation_rows
        scored = score_source(
            self.built.sharded,
            self.built.schema,
            self.validation,
            self.ranks,
            user_column=self.config.data.user_column,
            max_rows=None if rows is None else -(-rows // self.ranks.world_size),
        )
        better = 0
        if scored is not None:
            results = scored.metrics(self.built.schema.tasks)
            value = mean_auc(results)
            best = self.progress.best
            enough = -math.inf if best is None else best + self.settings.early_stopping.min_delta
            better = int(value > enough)  # NaN is not
            if better:
                self.progress.best = value
            assert self.reporter is not None
            self.reporter.validation(self.progress.step, results, best=bool(better))
        self.progress.validated_step = self.progress.step
        if self.ranks.largest(better):
            self.progress.best_step, self.progress.validations_since_best = self.progress.step, 0
        else:
            self.progress.validations_since_best += 1

    def _save(self) -> None:
        read = torch.zeros(self.ranks.world_size, dtype=torch.int64)
        read[self.ranks.rank] = self.progress.rows_read[self.ranks.rank]
        self.progress.rows_read = self.ranks.total(read).tolist()
        folder = save_checkpoint(self.run, self.progress, self.built.sharded, self.built.optimizers, self.ranks)
        if self.ranks.is_first:
            self.run.remember_as_latest()
            if self.progress.best_step == self.progress.step:
                mark_best(self.run, folder)
            keep_checkpoints(self.run, self.settings.keep_checkpoints)

    def _log(self, since: Since) -> Since:
        seconds = time.perf_counter() - since.started
        sums = self.ranks.total(torch.tensor([float(since.loss), float(since.rows)], dtype=torch.float64))
        if self.reporter:
            self.reporter.train(
                self.progress.step, float(sums[0] / sums[1]), self.recent.values(), float(sums[1]) / seconds
            )
        return self._since()

    def _since(self) -> Since:
        return Since(torch.zeros((), device=self.ranks.device), 0, time.perf_counter())

    @property
    def _rank_batch(self) -> int:
        return self.settings.batch_size // self.ranks.world_size

    def _loader(self, source_config: dict[str, Any], *, shuffle: bool) -> Loader:
        return make_loader(
            self.config, source_config, self.built, self.ranks, batch_size=self._rank_batch, shuffle=shuffle
        )

    def _note(self, text: str) -> None:
        if self.reporter:
            self.reporter.note(text)


def make_loader(
    config: Config,
    source_config: dict[str, Any],
    built: Built,
    ranks: Ranks,
    *,
    batch_size: int,
    shuffle: bool = False,
    labels: bool = True,
    keep: tuple[str, ...] = (),
) -> Loader:
    """This rank's shard of a configured source. `keep` adds to the column that GAUC groups by."""
    source: Source = build_target("data", source_config)
    users = (config.data.user_column,) if config.data.user_column and labels else ()
    return Loader(
        source,
        FeatureTransform(built.spec),
        built.schema.tasks if labels else (),
        batch_size,
        shard=ranks.rank,
        shards=ranks.world_size,
        seed=config.seed,
        shuffle=shuffle,
        request_column=config.data.request_column,
        keep=(*keep, *(user for user in users if user not in keep)),
    )


@contextmanager
def _sigterm_sets(trainer: Trainer) -> Iterator[None]:
    """SIGTERM ends the training after the current step, with a checkpoint."""

    def handle(number: int, frame: object) -> None:
        trainer.stop = True

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
