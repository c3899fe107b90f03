"""Rows that the run was not trained on, as the graph's inputs: what a variant's AUC is measured on.

N candidates of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from embedding_store.lookup import EmbeddingLookup
from export.assemble import Assembler
from export.bundle import Golden, Manifest
from export.example_inputs import Feed
from torchrank.data.loader import Loader
from torchrank.data.source import Source
from torchrank.features.transform import FeatureTransform
from torchrank.training.metrics import auc

BATCH_ROWS = 512  # int8 takes one scale for a whole batch: as many candidates as a request may have
MOST_BYTES = 1 << 30  # of feeds, which stay in memory while int8 looks for its layers

TaskScores = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Rows:
    """Feeds of a graph, one after another, and per task what belongs to their candidates, [rows]."""

    feeds: Sequence[Feed]
    wanted: Mapping[str, NDArray[np.float32]]  # labels, or the trainer's scores

    @property
    def count(self) -> int:
        return len(next(iter(self.wanted.values())))

    def scores(self, session: ort.InferenceSession) -> TaskScores:
        names = [node.name for node in session.get_inputs()]
        outputs = [session.run(list(self.wanted), {name: feed[name] for name in names}) for feed in self.feeds]
        return {
            task: np.concatenate(parts) for task, parts in zip(self.wanted, zip(*outputs, strict=True), strict=True)
        }


def assembler_of(graph: onnx.ModelProto, manifest: Manifest) -> Assembler:
    """Of the fp32 graph, whose inputs all variants have."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.graph.input}
    types = {name: np.int64 if kind == onnx.TensorProto.INT64 else np.float32 for name, kind in kinds.items()}
    return Assembler(manifest.schema, manifest.tables, types)


def validation_rows(
    source: Source,
    manifest: Manifest,
    lookup: EmbeddingLookup,
    assembler: Assembler,
    request_column: str | None,
    limit: int,
) -> Rows:
    """The first `limit` rows of `source`, or all, in its order, with their labels; up to the end of a batch.

    Fewer where their feeds have `MOST_BYTES`.
    """
    tasks = manifest.schema.tasks
    loader = Loader(source, FeatureTransform(manifest.features), tasks, BATCH_ROWS, request_column=request_column)
    feeds: list[Feed] = []
    labels: dict[str, list[NDArray[np.float32]]] = {task: [] for task in tasks}
    held = 0
    batches = loader.epoch(0)
    for batch in batches:
        feeds.append(assembler.inputs(batch.features, lookup.lookup(manifest.release, assembler.ids(batch.features))))
        for task, values in batch.labels.items():
            labels[task].append(values)
        held += sum(value.nbytes for value in feeds[-1].values())
        if batch.rows_read >= limit or held >= MOST_BYTES:
            batches.close()
            break
    return Rows(feeds, {task: np.concatenate(values) for task, values in labels.items()})


def golden_feeds(golden: Sequence[Golden], manifest: Manifest, lookup: EmbeddingLookup, assembler: Assembler) -> Rows:
    """One feed a request, as a service has them, with the trainer's scores."""
    transform = FeatureTransform(manifest.features)
    feeds = []
    for request in golden:
        features = transform.from_request(request.user, request.context, request.candidates)
        feeds.append(assembler.inputs(features, lookup.lookup(manifest.release, assembler.ids(features))))
    wanted = {
        task: np.array([score for request in golden for score in request.scores[task]], np.float32)
        for task in manifest.schema.tasks
    }
    return Rows(feeds, wanted)


def aucs(rows: Rows, scores: TaskScores) -> dict[str, float]:
    """Per task; one whose labels are all alike has none."""
    found = {task: auc(labels, scores[task]) for task, labels in rows.wanted.items()}
    return {task: value for task, value in found.items() if not np.isnan(value)}


def largest_difference(one: Mapping[str, NDArray[np.float32]], other: Mapping[str, NDArray[np.float32]]) -> float:
    """Over all tasks; infinite where there is a NaN."""
    largest = max(float(np.abs(one[task] - other[task]).max(initial=0)) for task in one)
    return largest if np.isfinite(largest) else float("inf")
