"""What a user declares in `conf/features/*.yaml`: raw columns, and the features made of them."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from torchrank.features.declared import read_struct, read_value, require_mapping, require_name
from torchrank.features.errors import FeatureError, accepted

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

    accepts: ClassVar[tuple[ColumnType, ...]]  # the column types an operator reads

    @property
    def op(self) -> str:
        return str(self.__struct_config__.tag)

    def error(self, key: str, message: str) -> FeatureError:
        return FeatureError(f"feature {self.name!r}: {message}", f"features.{self.name}.{key}")

    def check(self, columns: Mapping[str, Column]) -> None:
        """Raises FeatureError where the declaration does not fit together, or does not fit the columns."""
        if len(self.inputs) != 1:
            raise self.error("inputs", f"inputs: found {len(self.inputs)} columns; {self.op} reads exactly one")
        self._check_inputs(columns)

    def _check_inputs(self, columns: Mapping[str, Column]) -> None:
        for name in self.inputs:
            if name not in columns:
                raise self.error("inputs", f"unknown column {name!r}{accepted(name, columns)}")
            found = columns[name].type
            if found not in self.accepts:
                kinds = ", ".join(self.accepts)
                raise self.error("inputs", f"column {name!r} is {found}; {self.op} accepts: {kinds}")


class _Sparse(_Feature, frozen=True, kw_only=True):
    """Features that become ids of an embedding table; `table` defaults to the feature's name, and may be shared."""

    table: str | None = None
    dim: PositiveInt | None = None  # None: the spec's embedding_dim
    pooling: Pooling = "sum"

    @property
    def table_name(self) -> str:
        return self.name if self.table is None else self.table

    @property
    def rows(self) -> int:
        """Rows of the table: one more than the largest id this feature can make."""
        raise NotImplementedError

    @property
    def id_space(self) -> tuple[object, ...]:
        """What an id means: features that share a table must agree on it."""
        return ("hash", self.rows)


class _Ids(_Sparse, frozen=True, kw_only=True):
    """How raw values become ids. Exactly one of these three:

    buckets         id = xxh64(value, seed 42) mod buckets (Spark's pmod(xxhash64(value), buckets))
    num_embeddings  the value is the id, 0 … num_embeddings - 1
    vocabulary      id = position in the list

    `default` replaces a missing value: null, empty string, null element of a list, null instead of a list (an empty
    list has no values, hence none to replace). None leaves the feature empty there.
    `oov` says what an unknown value (outside num_embeddings or vocabulary) becomes: "row", one more table row
    shared by all of them (the last), or "drop", no id.
    """

    buckets: PositiveInt | None = None
    num_embeddings: PositiveInt | None = None
    vocabulary: tuple[str | int, ...] | None = None
    default: str | int | None = None
    oov: Literal["row", "drop"] = "row"

    accepts: ClassVar[tuple[ColumnType, ...]] = ("string", "int64", "list<string>", "list<int64>")

    @property
    def known(self) -> int:
        """How many ids stand for known values."""
        if self.vocabulary is not None:
            return len(self.vocabulary)
        known = self.buckets if self.buckets is not None else self.num_embeddings
        assert known is not None  # `check` saw to it
        return known

    @property
    def rows(self) -> int:
        return self.known + (self.buckets is None and self.oov == "row")

    @property
    def id_space(self) -> tuple[object, ...]:
        if self.buckets is not None:
            return ("hash", self.rows)
        return ("values", self.rows, self.vocabulary)

    def check(self, columns: Mapping[str, Column]) -> None:
        super().check(columns)
        given = [key for key in ("buckets", "num_embeddings", "vocabulary") if getattr(self, key) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise self.error("buckets", f"found {found}; accepted: exactly one of buckets, num_embeddings, vocabulary")
        if self.buckets is not None and self.oov != "row":
            raise self.error("oov", "oov: found 'drop' beside buckets, where no value is unknown; leave it out")
        self._check_values(columns[self.inputs[0]].type)

    def _check_values(self, kind: ColumnType) -> None:
        is_string = "string" in kind
        if is_string and self.num_embeddings is not None:
            raise self.error(
                "num_embeddings",
                f"num_embeddings takes the value itself as id, but column {self.inputs[0]!r} is {kind}; "
                "accepted for it: buckets, vocabulary",
            )
        if self.vocabulary is not None:
            self._check_vocabulary(self.vocabulary, is_string)
        if self.default is not None:
            self._check_value("default", self.default, is_string)
            if self.oov == "drop" and not self._knows(self.default):
                raise self.error("default", f"default {self.default!r} is an unknown value itself, and oov drops those")

    def _check_vocabulary(self, vocabulary: tuple[str | int, ...], is_string: bool) -> None:
        if not vocabulary:
            raise self.error("vocabulary", "vocabulary: found an empty list; accepted: one value or more")
        for value in vocabulary:
            self._check_value("vocabulary", value, is_string)
        value, count = Counter(vocabulary).most_common(1)[0]
        if count > 1:
            raise self.error("vocabulary", f"vocabulary: {value!r} stands in it {count} times; accepted: once")

    def _check_value(self, key: str, value: str | int, is_string: bool) -> None:
        if is_string:
            if not isinstance(value, str) or not value:
                raise self.error(key, f"{key}: found {value!r}; accepted for a string column: a string, not empty")
        elif not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise self.error(key, f"{key}: found {value!r}; accepted for an int64 column: an int of 64 bits")

    def _knows(self, value: str | int) -> bool:
        if self.vocabulary is not None:
            return value in self.vocabulary
        return isinstance(value, int) and 0 <= value < self.known


class Id(_Ids, frozen=True, kw_only=True, tag="id"):
    """One id, or several from a list column, pooled."""


class LastK(_Ids, frozen=True, kw_only=True, tag="last_k"):
    """Sequence: the last `max_length` elements of a list column, oldest first. Never pooled.

    The elements are cut first; then missing ones take the default or are left out, and unknown ones follow `oov`.
    """

    max_length: PositiveInt

    accepts: ClassVar[tuple[ColumnType, ...]] = ("list<string>", "list<int64>")


class Bucketize(_Sparse, frozen=True, kw_only=True, tag="bucketize"):
    """id = how many boundaries are ≤ the value; `default` replaces a missing value (null, NaN), None leaves it empty.

    Values of a float32 column are compared with the boundaries rounded to float32, so that 0.7 reaches 0.7.
    """

    boundaries: tuple[float, ...]
    default: float | None = None

    accepts: ClassVar[tuple[ColumnType, ...]] = ("float32", "int64", "list<float32>", "list<int64>")

    @property
    def rows(self) -> int:
        return len(self.boundaries) + 1

    @property
    def id_space(self) -> tuple[object, ...]:
        return ("boundaries", self.rows, self.boundaries)

    def check(self, columns: Mapping[str, Column]) -> None:
        super().check(columns)
        pairs = zip(self.boundaries, self.boundaries[1:], strict=False)
        if not self.boundaries or any(low >= high for low, high in pairs):
            found = f"found {list(self.boundaries)}"
            raise self.error("boundaries", f"boundaries: {found}; accepted: one number or more, each above the last")
        if "float32" in columns[self.inputs[0]].type:
            rounded = [struct.unpack("f", struct.pack("f", value))[0] for value in self.boundaries]
            if len(set(rounded)) < len(rounded):
                raise self.error("boundaries", "boundaries: two of them are one and the same number in float32")


class Combo(_Sparse, frozen=True, kw_only=True, tag="combo"):
    """Cross of two or more scalar columns: id = Spark's pmod(xxhash64(a, b, …), buckets).

    Missing values (null, empty string) are skipped, as Spark skips nulls; a row without any value still has an id.
    """

    buckets: PositiveInt

    accepts: ClassVar[tuple[ColumnType, ...]] = ("string", "int64")

    @property
    def rows(self) -> int:
        return self.buckets

    def check(self, columns: Mapping[str, Column]) -> None:
        if len(self.inputs) < 2 or len(set(self.inputs)) < len(self.inputs):
            raise self.error("inputs", f"inputs: found {list(self.inputs)}; combo reads two or more different columns")
        self._check_inputs(columns)


class Raw(_Feature, frozen=True, kw_only=True, tag="raw"):
    """One dense float: missing → default, then clip, log1p (sign-preserving), then z-score or min-max (as given).

    Missing is null or NaN. An infinite value is clipped; where there is no clip it is an error.
    """

    default: float = 0.0
    clip: tuple[float, float] | None = None
    log1p: bool = False
    zscore: tuple[float, float] | None = None  # mean, standard deviation
    minmax: tuple[float, float] | None = None  # lowest, highest; outside values leave [0, 1] unless clipped

    accepts: ClassVar[tuple[ColumnType, ...]] = ("float32", "int64")

    def check(self, columns: Mapping[str, Column]) -> None:
        super().check(columns)
        if self.zscore is not None and self.minmax is not None:
            raise self.error("zscore", "found zscore and minmax; accepted: at most one of them")
        if self.zscore is not None and self.zscore[1] <= 0:
            raise self.error("zscore", f"zscore: found standard deviation {self.zscore[1]}; accepted: above 0")
        for key in ("clip", "minmax"):
            bounds = getattr(self, key)
            if bounds is not None and bounds[0] >= bounds[1]:
                raise self.error(key, f"{key}: found {list(bounds)}; accepted: lowest, highest")


Feature = Id | LastK | Bucketize | Combo | Raw
SparseFeature = Id | LastK | Bucketize | Combo

_OPERATORS: dict[str, type[Feature]] = {
    "id": Id,
    "last_k": LastK,
    "bucketize": Bucketize,
    "combo": Combo,
    "raw": Raw,
}


class FeatureSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole declaration; also stored in the bundle's manifest, so that serving runs the same features."""

    columns: dict[str, Column]
    features: tuple[Feature, ...]
    embedding_dim: PositiveInt = 16

    def used_columns(self) -> tuple[str, ...]:
        """The columns that features read, in the order they are declared."""
        used = {name for feature in self.features for name in feature.inputs}
        return tuple(name for name in self.columns if name in used)

    def sides(self) -> dict[str, Side]:
        """Each feature's side: user and context features have one row per request, item and cross per candidate."""
        return {feature.name: self._side(feature) for feature in self.features}

    def _side(self, feature: Feature) -> Side:
        sides = {self.columns[name].side for name in feature.inputs}
        if "item" in sides:
            return "item" if sides == {"item"} else "cross"
        return "user" if sides == {"user"} else "context"

    def dim(self, feature: SparseFeature) -> int:
        return self.embedding_dim if feature.dim is None else feature.dim

    def check(self) -> None:
        """Raises FeatureError where the declaration contradicts itself."""
        if not self.features:
            raise FeatureError("features: found none; accepted: one or more", "features")
        name, count = Counter(feature.name for feature in self.features).most_common(1)[0]
        if count > 1:
            raise FeatureError(f"feature {name!r} is declared {count} times; accepted: once", f"features.{name}")
        tables: dict[str, list[SparseFeature]] = {}
        for feature in self.features:
            feature.check(self.columns)
            if not isinstance(feature, Raw):
                tables.setdefault(feature.table_name, []).append(feature)
        for table, sharing in tables.items():
            self._check_table(table, sharing)

    def _check_table(self, table: str, sharing: list[SparseFeature]) -> None:
        field = f"features.{sharing[-1].name}.table"
        share = f"table {table!r}: {len(sharing)} features share it with"
        dims = [self.dim(feature) for feature in sharing]
        if len(set(dims)) > 1:
            raise FeatureError(f"{share} dims {', '.join(map(str, dims))}; a shared table has one dim", field)
        rows = [feature.rows for feature in sharing]
        if len(set(rows)) > 1:
            found = ", ".join(map(str, rows))
            raise FeatureError(f"{share} rows {found}; a shared table has one number of rows", field)
        if len({feature.id_space for feature in sharing}) > 1:
            names = ", ".join(feature.name for feature in sharing)
            raise FeatureError(f"{share} ids of different meaning ({names}); one value must have one id in it", field)


def load_feature_spec(mapping: Mapping[str, Any]) -> FeatureSpec:
    """A declaration from plain mappings and lists, as YAML or JSON gives them. Raises FeatureError."""
    declared = require_mapping("feature declaration", mapping, "features")
    for key in declared:
        if key not in FeatureSpec.__struct_fields__:
            raise FeatureError(f"unknown key {key!r}{accepted(key, FeatureSpec.__struct_fields__)}", key)
    for key in ("columns", "features"):
        if key not in declared:
            raise FeatureError(f"key {key!r} is missing; accepted: {', '.join(FeatureSpec.__struct_fields__)}", key)
    features = declared["features"]
    if not isinstance(features, list | tuple):
        raise FeatureError(f"features: found {type(features).__name__}; accepted: a list of features", "features")
    columns = {
        require_name("column", name, "columns"): read_struct(f"column {name!r}", column, Column, f"columns.{name}")
        for name, column in require_mapping("columns", declared["columns"], "columns").items()
    }
    dim = read_value(
        "feature declaration", "embedding_dim", declared.get("embedding_dim", 16), PositiveInt, "embedding_dim"
    )
    spec = FeatureSpec(columns, tuple(_load_feature(i, item) for i, item in enumerate(features)), dim)
    spec.check()
    return spec


def _load_feature(position: int, declared: object) -> Feature:
    place = f"features[{position}]"
    mapping = require_mapping(place, declared, place)
    if "name" not in mapping:
        raise FeatureError(f"{place}: key 'name' is missing", place)
    name = require_name(f"{place}: key 'name'", mapping["name"], place)
    where, field = f"feature {name!r}", f"features.{name}"
    op = mapping.get("op")
    if op not in _OPERATORS:
        found = "key 'op' is missing" if op is None else f"unknown op {op!r}"
        raise FeatureError(f"{where}: {found}{accepted(str(op), _OPERATORS)}", f"{field}.op")
    if mapping.get("table") is not None:
        require_name(f"{where}: key 'table'", mapping["table"], f"{field}.table")
    return read_struct(where, mapping, _OPERATORS[op], field, also=("op",))
