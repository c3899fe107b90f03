"""From ids to the graph's named inputs: which ids each table is asked for, and where its rows go.

Shape letters: U requests, N candidates, D dim, T max_length, n ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding_store.gather import pad_into, pool_into
from embedding_store.lookup import LookupReply
from embedding_store.release import TableInfo
from export.bundle import InvalidBundle
from torchrank.features.batch import FeatureBatch, Ragged, SideBatch
from torchrank.features.schema import FeatureSchema, Rows, SequenceSlot, Slot

IdSource = tuple[Rows, str]  # side of the batch, feature
InputType = type[np.float32] | type[np.float16] | type[np.int64]
Feed = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Pooled:
    """One of `user_pooled` and `item_pooled`: [rows, width]."""

    name: str
    rows: Rows
    width: int
    slots: tuple[Slot, ...]


class Assembler:
    """The schema, cut down to what the graph takes: inputs that were optimised away cost no look-up."""

    def __init__(self, schema: FeatureSchema, tables: Sequence[TableInfo], inputs: Mapping[str, InputType]) -> None:
        """`inputs`: names of the graph's inputs and their types, float32 or float16 but for `user_index` and lengths.

        Raises InvalidBundle where one has no place in the schema, or another type.
        """
        self._codecs = {table.name: table.codec for table in tables}
        self._inputs = dict(inputs)
        pooled = (
            _pooled("user_pooled", "user", schema.user_pooled),
            _pooled("item_pooled", "item", schema.item_pooled),
        )
        self._pooled = tuple(p for p in pooled if p.name in self._inputs)
        self._sequences = tuple(s for s in schema.sequences if {s.name, f"{s.name}.length"} & self._inputs.keys())
        dense: dict[str, tuple[Rows, int]] = {
            "user_dense": ("user", len(schema.user_dense)),
            "item_dense": ("item", len(schema.item_dense)),
        }
        self._dense = {name: place for name, place in dense.items() if name in self._inputs}
        self._check_inputs()
        self._sources = self._plan()

    def widths(self) -> dict[str, int]:
        """Columns of each float input, to be held against the graph's own shapes."""
        pooled = {p.name: p.width for p in self._pooled}
        dense = {name: width for name, (_, width) in self._dense.items()}
        return pooled | dense | {s.name: s.dim for s in self._sequences if s.name in self._inputs}

    def ids(self, batch: FeatureBatch) -> dict[str, NDArray[np.int64]]:
        """Per table the ids of all features that read it, one after another; duplicates stay."""
        return {
            table: _joined([_ragged(batch, source).values for source in sources])
            for table, sources in self._sources.items()
        }

    def inputs(self, batch: FeatureBatch, reply: LookupReply) -> Feed:
        """The graph's inputs by name, out of the reply to `ids(batch)`."""
        indices = self._indices(batch, reply)
        feed: Feed = {}
        for pooled in self._pooled:
            feed[pooled.name] = self._pool(pooled, batch, reply, indices)
        for sequence in self._sequences:
            self._pad(sequence, batch, reply, indices, feed)
        for name, (rows, _) in self._dense.items():
            feed[name] = _side(batch, rows).dense.astype(self._inputs[name], copy=False)
        if "user_index" in self._inputs:
            feed["user_index"] = batch.user_index
        return feed

    def _check_inputs(self) -> None:
        floats = self.widths().keys()
        integers = {f"{s.name}.length" for s in self._sequences} | {"user_index"}
        unknown = self._inputs.keys() - floats - integers
        if unknown:
            raise InvalidBundle(
                f"the graph takes inputs that the schema does not describe: {', '.join(sorted(unknown))}"
            )
        for name, found in self._inputs.items():
            accepted: tuple[InputType, ...] = (np.float32, np.float16) if name in floats else (np.int64,)
            if found not in accepted:
                names = " or ".join(kind.__name__ for kind in accepted)
                raise InvalidBundle(f"input {name!r} of the graph is {found.__name__}; accepted: {names}")

    def _plan(self) -> dict[str, tuple[IdSource, ...]]:
        """A feature in two groups stands once in each group's table; twice in one table only once."""
        sources: dict[str, dict[IdSource, None]] = {}
        for pooled in self._pooled:
            for slot in pooled.slots:
                sources.setdefault(slot.table, {})[pooled.rows, slot.feature] = None
        for sequence in self._sequences:
            if sequence.name in self._inputs:  # a graph that reads only the length needs no rows
                sources.setdefault(sequence.table, {})[sequence.rows, sequence.feature] = None
        unknown = sources.keys() - self._codecs.keys()
        if unknown:
            raise InvalidBundle(f"the schema reads tables that the bundle lacks: {', '.join(sorted(unknown))}")
        return {table: tuple(found) for table, found in sources.items()}

    def _indices(self, batch: FeatureBatch, reply: LookupReply) -> Mapping[tuple[str, IdSource], NDArray[np.int64]]:
        """Each table's `index`, cut at the features again."""
        indices: dict[tuple[str, IdSource], NDArray[np.int64]] = {}
        for table, sources in self._sources.items():
            start = 0
            for source in sources:
                stop = start + len(_ragged(batch, source).values)
                indices[table, source] = reply.tables[table].index[start:stop]
                start = stop
        return indices

    def _buffer(self, name: str, *shape: int) -> NDArray[np.floating[Any]]:
        return np.empty(shape, np.float16 if self._inputs[name] is np.float16 else np.float32)

    def _pool(
        self,
        pooled: Pooled,
        batch: FeatureBatch,
        reply: LookupReply,
        indices: Mapping[tuple[str, IdSource], NDArray[np.int64]],
    ) -> NDArray[np.floating[Any]]:
        out = self._buffer(pooled.name, _side(batch, pooled.rows).rows, pooled.width)
        for slot in pooled.slots:
            source = (pooled.rows, slot.feature)
            ragged = _ragged(batch, source)
            pool_into(
                self._codecs[slot.table], reply.tables[slot.table].rows, indices[slot.table, source],
                ragged.offsets, out, slot.start, slot.dim, slot.pooling == "mean", ragged.weights,
            )  # fmt: skip
        return out

    def _pad(
        self,
        sequence: SequenceSlot,
        batch: FeatureBatch,
        reply: LookupReply,
        indices: Mapping[tuple[str, IdSource], NDArray[np.int64]],
        feed: Feed,
    ) -> None:
        source = (sequence.rows, sequence.feature)
        ragged = _ragged(batch, source)
        if f"{sequence.name}.length" in self._inputs:
            feed[f"{sequence.name}.length"] = np.minimum(ragged.lengths, sequence.max_length)
        if sequence.name in self._inputs:
            rows = _side(batch, sequence.rows).rows
            out = self._buffer(sequence.name, rows, sequence.max_length, sequence.dim)
            encoded = reply.tables[sequence.table].rows
            pad_into(self._codecs[sequence.table], encoded, indices[sequence.table, source], ragged.offsets, out)
            feed[sequence.name] = out


def _pooled(name: str, rows: Rows, slots: tuple[Slot, ...]) -> Pooled:
    return Pooled(name, rows, sum(slot.dim for slot in slots), slots)


def _side(batch: FeatureBatch, rows: Rows) -> SideBatch:
    return batch.user if rows == "user" else batch.item


def _ragged(batch: FeatureBatch, source: IdSource) -> Ragged:
    rows, feature = source
    return _side(batch, rows).sparse[feature]


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
