"""What a user declares in `conf/features/*.yaml`: raw columns, and the features made of them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

ColumnSide = Literal["user", "context", "item"]
Side = Literal["user", "context", "item", "cross"]
ColumnType = Literal["string", "int64", "float32", "list<string>", "list<int64>", "list<float32>"]
Pooling = Literal["sum", "mean"]

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    side: ColumnSide
    type: ColumnType


class _Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", kw_only=True):
    name: str
    inputs: tuple[str, ...]


class _Sparse(_Feature, frozen=True, kw_only=True):
    """Features that become ids of an embedding table; `table` defaults to the feature's name, and may be shared."""

    table: str | None = None
    dim: PositiveInt | None = None  # None: the spec's embedding_dim
    pooling: Pooling = "sum"


class _Ids(_Sparse, frozen=True, kw_only=True):
    """How raw values become ids. Exactly one of these three:

    buckets         id = xxh64(value, seed 42) mod buckets (Spark's pmod(xxhash64(value), buckets))
    num_embeddings  the value is the id, 0 … num_embeddings - 1
    vocabulary      id = position in the list

    `default` replaces a missing value (null, absent key, empty string); None leaves the feature empty there.
    `oov` says what an unknown value (outside num_embeddings or vocabulary) becomes: "row", one more table row
    shared by all of them (the last), or "drop", no id.
    """

    buckets: PositiveInt | None = None
    num_embeddings: PositiveInt | None = None
    vocabulary: tuple[str, ...] | tuple[int, ...] | None = None
    default: str | int | None = None
    oov: Literal["row", "drop"] = "row"


class Id(_Ids, frozen=True, kw_only=True, tag="id"):
    """One id, or several from a list column, pooled."""


class LastK(_Ids, frozen=True, kw_only=True, tag="last_k"):
    """Sequence: the last `max_length` values of a list column, oldest first. Never pooled."""

    max_length: PositiveInt


class Bucketize(_Sparse, frozen=True, kw_only=True, tag="bucketize"):
    """id = how many boundaries are ≤ the value; `default` replaces a missing value, None leaves it empty."""

    boundaries: tuple[float, ...]
    default: float | None = None


class Combo(_Sparse, frozen=True, kw_only=True, tag="combo"):
    """Cross of two or more scalar columns: id = Spark's pmod(xxhash64(a, b, …), buckets), missing values skipped."""

    buckets: PositiveInt


class Raw(_Feature, frozen=True, kw_only=True, tag="raw"):
    """One dense float: missing → default, then clip, log1p (sign-preserving), then z-score or min-max (as given)."""

    default: float = 0.0
    clip: tuple[float, float] | None = None
    log1p: bool = False
    zscore: tuple[float, float] | None = None  # mean, standard deviation
    minmax: tuple[float, float] | None = None  # lowest, highest; outside values leave [0, 1] unless clipped


Feature = Id | LastK | Bucketize | Combo | Raw
SparseFeature = Id | LastK | Bucketize | Combo


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole declaration; also stored in the bundle's manifest, so that serving runs the same features."""

    columns: dict[str, Column]
    features: tuple[Feature, ...]
    embedding_dim: PositiveInt = 16
