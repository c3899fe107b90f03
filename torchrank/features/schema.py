"""FeatureSchema: where each feature sits in the inputs of a model. Shared by training, export and serving.

The model's inputs ("ModelInputs" in docs/architecture.md) are, with U requests and N candidates:

    user_pooled [U, ΣD]   item_pooled [N, ΣD]   user_dense [U, a]   item_dense [N, b]   user_index [N]
    and per sequence NAME [rows, T, D] and NAME.length [rows]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from torchrank.features.declared import require_name
from torchrank.features.errors import FeatureError, accepted
from torchrank.features.spec import FeatureSpec, LastK, Pooling, Raw, SparseFeature

Rows = Literal["user", "item"]

DEEP = "deep"  # the group that uses the features' own tables
_INPUTS = ("user_pooled", "item_pooled", "user_dense", "item_dense", "user_index")


class Slot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pooled embedding: columns start … start + dim of `user_pooled` or `item_pooled`."""

    group: str
    feature: str
    table: str
    dim: int
    start: int
    pooling: Pooling


class SequenceSlot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sequence: `name` float32 [rows, max_length, dim], right-padded with zeros, and `name`.length int64 [rows]."""

    name: str
    group: str
    feature: str
    table: str
    dim: int
    max_length: int
    rows: Rows


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One embedding table and the features that read it (a feature appears once per group that asks for it)."""

    name: str
    rows: int
    dim: int
    features: tuple[str, ...]


class EmbeddingGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model asks for: an embedding of `features` (None: all sparse ones), of `dim` (None: the spec's).

    The group named `deep` uses the features' own tables; any other group G has its own, named `G.TABLE`.
    """

    features: tuple[str, ...] | None = None
    dim: int | None = None


class FeatureSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    user_pooled: tuple[Slot, ...]
    item_pooled: tuple[Slot, ...]
    user_dense: tuple[str, ...]
    item_dense: tuple[str, ...]
    sequences: tuple[SequenceSlot, ...]
    tables: tuple[TableSpec, ...]
    tasks: tuple[str, ...]


def build_schema(
    spec: FeatureSpec, tasks: Sequence[str], groups: Mapping[str, EmbeddingGroup] | None = None
) -> FeatureSchema:
    """The inputs of a model that asks for `groups` (None: one group, `deep`, of all sparse features).

    Groups in the given order, features of a group in the order of the spec. Raises FeatureError.
    """
    if groups is None:
        groups = {DEEP: EmbeddingGroup()}
    on_user = {name: side in ("user", "context") for name, side in spec.sides().items()}
    pooled: dict[bool, list[Slot]] = {True: [], False: []}
    width = {True: 0, False: 0}
    sequences: list[SequenceSlot] = []
    tables: dict[str, TableSpec] = {}
    for group, feature, dim in _requested(spec, groups):
        table = _own_table(group, feature.table_name)
        _add_reader(tables, table, feature, dim)
        user = on_user[feature.name]
        if isinstance(feature, LastK):
            name = feature.name if group == DEEP else f"{group}.{feature.name}"
            rows: Rows = "user" if user else "item"
            sequences.append(SequenceSlot(name, group, feature.name, table, dim, feature.max_length, rows))
        else:
            pooled[user].append(Slot(group, feature.name, table, dim, width[user], feature.pooling))
            width[user] += dim
    dense = [feature.name for feature in spec.features if isinstance(feature, Raw)]
    _check_names(tasks, [sequence.name for sequence in sequences])
    return FeatureSchema(
        user_pooled=tuple(pooled[True]),
        item_pooled=tuple(pooled[False]),
        user_dense=tuple(name for name in dense if on_user[name]),
        item_dense=tuple(name for name in dense if not on_user[name]),
        sequences=tuple(sequences),
        tables=tuple(tables.values()),
        tasks=tuple(tasks),
    )


def _requested(spec: FeatureSpec, groups: Mapping[str, EmbeddingGroup]) -> Iterator[tuple[str, SparseFeature, int]]:
    """(group, feature, dim) in the order of the schema."""
    sparse = {feature.name: feature for feature in spec.features if not isinstance(feature, Raw)}
    for group, wanted in groups.items():
        field = f"groups.{group}"
        require_name(f"embedding group {group!r}", group, field)
        names = tuple(sparse) if wanted.features is None else wanted.features
        for name in names:
            if name not in sparse:
                raise FeatureError(
                    f"embedding group {group!r}: no sparse feature {name!r}{accepted(name, sparse)}", field
                )
        if len(set(names)) < len(names):
            raise FeatureError(f"embedding group {group!r}: found {', '.join(names)}; accepted: each one once", field)
        for name, feature in sparse.items():
            if name in names:
                yield group, feature, spec.dim(feature) if wanted.dim is None else wanted.dim


def _own_table(group: str, table: str) -> str:
    return table if group == DEEP else f"{group}.{table}"


def _add_reader(tables: dict[str, TableSpec], name: str, feature: SparseFeature, dim: int) -> None:
    readers = tables[name].features if name in tables else ()
    tables[name] = TableSpec(name, feature.rows, dim, (*readers, feature.name))


def _check_names(tasks: Sequence[str], sequences: Sequence[str]) -> None:
    """Inputs and outputs of the graph share one space of names."""
    if not tasks:
        raise FeatureError("tasks: found none; accepted: one or more", "tasks")
    taken = [*_INPUTS, *sequences, *(f"{name}.length" for name in sequences)]
    for name in sequences:
        if name in _INPUTS:
            raise FeatureError(f"sequence feature {name!r}: the name is taken by an input of every model", name)
    for position, task in enumerate(tasks):
        require_name(f"tasks[{position}]", task, "tasks")
        if task in taken or task in tasks[:position]:
            raise FeatureError(f"task {task!r}: the name is taken by another task or by an input of the model", "tasks")
