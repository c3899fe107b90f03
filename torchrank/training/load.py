"""A finished run, ready to score: its module on this process's ranks with the best checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchrank.data.loader import Batch
from torchrank.data.torch_batch import TorchBatch
from torchrank.training.checkpoint import load_weights
from torchrank.training.config import Config
from torchrank.training.distributed import Ranks
from torchrank.training.module import Built, build
from torchrank.training.run import Run
from torchrank.training.scoring import for_each_scored, score_source
from torchrank.training.trainer import make_loader

_BATCH_ROWS = 8192  # per rank


@dataclass(frozen=True)
class LoadedRun:
    run: Run
    config: Config
    built: Built
    ranks: Ranks

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.built.schema.tasks

    def metrics(self, source: dict[str, Any]) -> dict[str, dict[str, float]] | None:
        """Collective: metrics per task, on the first rank; None elsewhere."""
        loader = make_loader(self.config, source, self.built, self.ranks, batch_size=_BATCH_ROWS)
        users = self.config.data.user_column
        scored = score_source(self.built.sharded, self.built.schema, loader, self.ranks, user_column=users)
        return scored.metrics(self.tasks) if scored is not None else None

    def scores(self, source: dict[str, Any], keep: tuple[str, ...], take: Callable[[Batch, Any], None]) -> None:
        """Collective: `take(batch, probabilities float32 [N, tasks])` for this rank's rows; no labels are read."""
        loader = make_loader(
            self.config, source, self.built, self.ranks, batch_size=_BATCH_ROWS, labels=False, keep=keep
        )

        def collect(batch: Batch, torch_batch: TorchBatch, probabilities: Any) -> None:
            take(batch, probabilities.cpu().numpy())

        for_each_scored(self.built.sharded, self.built.schema, loader, self.ranks, collect)

    def source(self, path: str | None) -> dict[str, Any]:
        """The configured test data (else validation), or the same kind of source on another path."""
        data = self.config.data
        configured = data.test or data.valid
        if path is not None:
            return {**(configured or data.train), "path": path}
        if configured is None:
            raise ValueError("the run's data has neither test nor valid: name the data by --data PATH")
        return configured


def scoring_device(config: Config) -> str:
    """A run that was trained on CUDA is scored where there is none, too."""
    return "auto" if config.device == "cuda" else config.device


def load_run(run: Run, ranks: Ranks) -> LoadedRun:
    """Collective. Raises ValueError where the run has no checkpoint."""
    config = run.config()
    checkpoint = run.checkpoint()
    built = build(config, ranks)
    load_weights(checkpoint, built.sharded, ranks)
    return LoadedRun(run, config, built, ranks)
