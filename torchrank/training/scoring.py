"""Scores of a whole source by a sharded module, and the metrics of those scores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from torchrank.data.loader import Batch, Loader
from torchrank.data.torch_batch import TorchBatch, to_torch
from torchrank.features.schema import FeatureSchema
from torchrank.training.distributed import Ranks
from torchrank.training.metrics import task_metrics


@dataclass(frozen=True)
class Scored:
    """Rows of all ranks: labels and scores (probabilities) float32 [N, tasks]; groups int64 [N] or None."""

    labels: NDArray[np.float32]
    scores: NDArray[np.float32]
    groups: NDArray[np.int64] | None

    def metrics(self, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
        return {task: task_metrics(self.labels[:, k], self.scores[:, k], self.groups) for k, task in enumerate(tasks)}


def score_source(
    sharded: DistributedModelParallel,
    schema: FeatureSchema,
    loader: Loader,
    ranks: Ranks,
    *,
    user_column: str | None = None,
    max_rows: int | None = None,
) -> Scored | None:
    """Collective; the result is on the first rank, None elsewhere. `max_rows` is per rank.

    Each rank scores its shard once. A shard has at most one batch more than another: a rank without one repeats its
    last, uncounted, because look-ups in sharded tables need every rank.
    """
    labels, scores, groups = [], [], []

    def collect(batch: Batch, torch_batch: TorchBatch, probabilities: Tensor) -> None:
        labels.append(torch_batch.labels.cpu())
        scores.append(probabilities.cpu())
        if user_column is not None:
            groups.append(torch.from_numpy(group_ids(batch.columns.column(user_column))))

    for_each_scored(sharded, schema, loader, ranks, collect, max_rows=max_rows)
    tasks = len(schema.tasks)
    all_labels = ranks.gather(torch.cat(labels) if labels else torch.zeros(0, tasks))
    all_scores = ranks.gather(torch.cat(scores) if scores else torch.zeros(0, tasks))
    all_groups = None
    if user_column is not None:
        all_groups = ranks.gather(torch.cat(groups) if groups else torch.zeros(0, dtype=torch.int64))
    if all_labels is None or all_scores is None:
        return None
    return Scored(all_labels.numpy(), all_scores.numpy(), all_groups.numpy() if all_groups is not None else None)


def for_each_scored(
    sharded: DistributedModelParallel,
    schema: FeatureSchema,
    loader: Loader,
    ranks: Ranks,
    take: Callable[[Batch, TorchBatch, Tensor], None],
    *,
    max_rows: int | None = None,
) -> None:
    """Collective: calls `take(batch, torch batch, probabilities float32 [N, tasks])` for this rank's batches."""
    if not loader.common_batches:
        raise ValueError(f"there are fewer rows to score than ranks ({ranks.world_size})")
    was_training = sharded.training
    sharded.eval()
    spare: TorchBatch | None = None
    counted = 0
    with torch.no_grad(), closing(loader.epoch(0)) as batches:
        while True:
            batch = next(batches, None) if max_rows is None or counted < max_rows else None
            if not ranks.largest(int(batch is not None)):
                break
            if batch is not None:
                spare = to_torch(batch.features, batch.labels, schema, loader.batch_size).to(ranks.device)
            assert spare is not None  # every rank has a first batch
            probabilities = torch.sigmoid(sharded(spare).float())
            if batch is not None:
                counted += batch.rows
                take(batch, spare, probabilities)
    sharded.train(was_training)


def group_ids(column: pa.Array) -> NDArray[np.int64]:
    """int64 [N], equal where the values are: the same on every rank, unlike the codes of a dictionary."""
    encoded = column.dictionary_encode()
    hashes = [xxhash.xxh64_intdigest(str(value).encode()) for value in encoded.dictionary.to_pylist()]
    codes = pc.fill_null(encoded.indices, len(hashes)).to_numpy(zero_copy_only=False)
    return np.array([*hashes, 0], np.uint64).view(np.int64)[codes]
