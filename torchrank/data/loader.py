"""Loader: a source's rows as batches of features and labels, made ahead in a background thread.

One thread is enough here: Arrow decodes and numba hashes without the Python lock, so a batch is made while torch
computes the last one. More processes would copy every batch between address spaces.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from torchrank.data.columns import Columns
from torchrank.data.source import Order, Source
from torchrank.features.batch import FeatureBatch
from torchrank.features.spec import FeatureSpec


class Transform(Protocol):
    """What the loader needs of torchrank.features.transform.FeatureTransform."""

    @property
    def spec(self) -> FeatureSpec: ...

    def from_arrow(self, batch: pa.RecordBatch, *, request_column: str | None = None) -> FeatureBatch: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """N candidates. `labels`: float32 [N] per task; `columns`: the kept columns, N rows; `rows_read`: how many rows of
    this shard's pass were consumed up to and including this batch, the `skip` that goes on behind it."""

    features: FeatureBatch
    labels: dict[str, NDArray[np.float32]]
    columns: pa.RecordBatch
    rows_read: int

    @property
    def rows(self) -> int:
        return len(self.features.user_index)


class Loader:
    """Batches of `batch_size` rows of one shard; the last of a pass may be shorter.

    labels: names of the label columns, which are the tasks; may be empty (prediction). request_column: runs of equal
    values are one request, whose user and context features are computed once. keep: columns handed on in
    `Batch.columns`, as the file has them unless a feature or label reads them too. prefetch: batches made ahead.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        labels: Sequence[str],
        batch_size: int,
        *,
        shard: int = 0,
        shards: int = 1,
        seed: int = 0,
        shuffle: bool = False,
        request_column: str | None = None,
        keep: Sequence[str] = (),
        prefetch: int = 2,
    ) -> None:
        if batch_size < 1 or prefetch < 1:
            raise ValueError(f"batch_size {batch_size}, prefetch {prefetch}: both must be at least 1")
        self._source = source
        self._transform = transform
        self._labels = tuple(labels)
        self._keep = tuple(keep)
        self.batch_size = batch_size
        self._prefetch = prefetch
        self._order = Order(shard, shards, seed, shuffle=shuffle, request_column=request_column)
        self._columns = _columns(transform.spec, self._labels, self._keep, request_column)

    @property
    def rows(self) -> int:
        """Rows of this shard in one pass."""
        first, last = self._order.rows(self._source.rows)
        return last - first

    @property
    def batches(self) -> int:
        """Batches of this shard in one pass."""
        return -(-self.rows // self.batch_size)

    @property
    def common_batches(self) -> int:
        """Batches that every shard has, 0 where there are fewer rows than shards. No shard has more than one beyond."""
        return -(-(self._source.rows // self._order.shards) // self.batch_size)

    def epoch(self, epoch: int, *, skip: int = 0) -> Generator[Batch, None, None]:
        """One pass, without the first `skip` rows. Errors of the background thread are raised here; closing the
        iterator (or dropping it) ends the thread."""
        order = replace(self._order, epoch=epoch)
        return _ahead(self._make(order, skip), self._prefetch)

    def _make(self, order: Order, skip: int) -> Iterator[Batch]:
        position = skip
        for rows in _rebatch(self._source.stream(self._columns, order, skip=skip), self.batch_size):
            position += rows.num_rows
            labels = {name: np.array(rows.column(name)) for name in self._labels}  # a copy: Arrow's memory is read-only
            features = self._transform.from_arrow(rows, request_column=order.request_column)
            yield Batch(features, labels, rows.select(list(self._keep)), position)


def _columns(spec: FeatureSpec, labels: tuple[str, ...], keep: tuple[str, ...], request_column: str | None) -> Columns:
    inputs = spec.used_columns()
    leaked = [name for name in labels if name in inputs]
    if leaked:
        raise ValueError(f"columns {leaked} are labels and inputs of features: a model would read its answer")
    requests = () if request_column is None else (request_column,)
    return Columns({name: spec.columns[name].type for name in inputs}, labels, (*keep, *requests))


def _rebatch(parts: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `size`; copies only those that span two parts."""
    waiting: list[pa.RecordBatch] = []
    missing = size
    for part in parts:
        begin = 0
        while part.num_rows - begin >= missing:
            yield _joined([*waiting, part.slice(begin, missing)])
            begin += missing
            waiting, missing = [], size
        if begin < part.num_rows:
            waiting.append(part.slice(begin))
            missing -= part.num_rows - begin
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    return parts[0] if len(parts) == 1 else pa.concat_batches(parts)


def _ahead(batches: Iterator[Batch], depth: int) -> Generator[Batch, None, None]:
    """Runs `batches` in a thread, at most `depth` of them ahead of the reader."""
    results: SimpleQueue[Batch | BaseException | None] = SimpleQueue()
    slots = threading.Semaphore(depth)
    stopped = threading.Event()

    def produce() -> None:
        try:
            while slots.acquire() and not stopped.is_set():
                batch = next(batches, None)
                results.put(batch)
                if batch is None:
                    return
        except BaseException as error:  # noqa: BLE001 - re-raised by the reader, which would wait for ever otherwise
            results.put(error)

    thread = threading.Thread(target=produce, name="torchrank-loader", daemon=True)
    thread.start()
    try:
        while (result := results.get()) is not None:
            if isinstance(result, BaseException):
                raise result
            slots.release()
            yield result
    finally:
        stopped.set()
        slots.release()
        thread.join()
