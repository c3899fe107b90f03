"""FeatureTransform: raw columns to FeatureBatch, from an Arrow batch or from one request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchrank.features.batch import FeatureBatch, Ragged, SideBatch
from torchrank.features.columns import Floats, Ints, RawColumn, column_from_values
from torchrank.features.errors import FeatureError, accepted
from torchrank.features.operators import ComboOperator, IdOperator, RawOperator
from torchrank.features.spec import ColumnSide, Combo, FeatureSpec, Raw

if TYPE_CHECKING:
    import pyarrow as pa

FieldOf = Callable[[str, int], str]  # (column, row) -> where that value stands, for error messages


class FeatureTransform:
    """The features of `spec`. Keeps nothing between calls; thread-safe. Raises FeatureError on a bad declaration."""

    def __init__(self, spec: FeatureSpec) -> None:
        spec.check()
        self.spec = spec
        self._user = _SideOperators(spec, ("user", "context"))
        self._item = _SideOperators(spec, ("item", "cross"))
        self._columns: dict[ColumnSide, tuple[str, ...]] = {
            side: tuple(name for name in spec.used_columns() if spec.columns[name].side == side)
            for side in ("user", "context", "item")
        }

    def from_arrow(self, batch: pa.RecordBatch | pa.Table, *, request_column: str | None = None) -> FeatureBatch:
        """Features of a record batch, one candidate a row.

        Consecutive rows with equal `request_column` are one request, whose user and context features are those of
        its first row. Without a request column every row is a request of its own.

        Raises FeatureError with a column's name: missing, of a wrong type, or with a value that a feature refuses.
        """
        from torchrank.features.arrow_columns import column_from_arrow, first_rows_of_requests

        candidates = batch.num_rows
        if request_column is None:
            first = np.arange(candidates)
        else:
            first = first_rows_of_requests(request_column, _arrow_column(batch, request_column))
        columns: dict[str, RawColumn] = {}
        for name in self.spec.used_columns():
            column = self.spec.columns[name]
            rows = first if column.side != "item" and len(first) < candidates else None
            columns[name] = column_from_arrow(name, _arrow_column(batch, name), column.type, rows)
        user_index = np.repeat(np.arange(len(first)), np.diff(first, append=candidates))
        return self._apply(columns, len(first), user_index, lambda name, _: name)

    def from_request(
        self, user: Mapping[str, Any], context: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]
    ) -> FeatureBatch:
        """Features of one request: U = 1, N = len(candidates), which may be 0.

        Every column that a feature reads has to be there. None (JSON's null) is a missing value; keys that nothing
        reads are ignored. Raises FeatureError with the field: `user.age`, `candidates[3].price`, `context.tags[0]`.
        """
        columns = self._read("user", [user]) | self._read("context", [context]) | self._read("item", candidates)
        return self._apply(columns, 1, np.zeros(len(candidates), dtype=np.int64), self._field)

    def _read(self, side: ColumnSide, rows: Sequence[Mapping[str, Any]]) -> dict[str, RawColumn]:
        """The columns of one side, one row per mapping."""
        names = self._columns[side]
        try:
            columns = [list(map(itemgetter(name), rows)) for name in names]
        except (KeyError, TypeError):
            self._check_rows(side, rows)
            raise
        return {
            name: column_from_values(values, self.spec.columns[name].type, partial(self._field, name))
            for name, values in zip(names, columns, strict=True)
        }

    def _check_rows(self, side: ColumnSide, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises FeatureError for the first row that is no mapping, or lacks a key."""
        for number, row in enumerate(rows):
            place = _place(side, number)
            if not isinstance(row, Mapping):
                raise FeatureError(f"{place}: found {type(row).__name__}; accepted: an object of fields", place)
            for name in self._columns[side]:
                if name not in row:
                    field = f"{place}.{name}"
                    raise FeatureError(f"{field}: the field is missing; null says that its value is not known", field)

    def _field(self, column: str, row: int) -> str:
        return f"{_place(self.spec.columns[column].side, row)}.{column}"

    def _apply(
        self, columns: Mapping[str, RawColumn], users: int, user_index: NDArray[np.int64], field_of: FieldOf
    ) -> FeatureBatch:
        """user_index: int64 [N], the request of each candidate."""
        user_rows, item_rows = np.arange(users), np.arange(len(user_index))
        on_item = {
            name: item_rows if self.spec.columns[name].side == "item" else user_index for name in columns
        }  # a cross feature reads the columns of its request
        return FeatureBatch(
            user=self._user.apply(columns, users, dict.fromkeys(columns, user_rows), field_of),
            item=self._item.apply(columns, len(user_index), on_item, field_of),
            user_index=user_index,
        )


class _SideOperators:
    """The operators whose features share their rows: of user and context, or of item and cross features."""

    def __init__(self, spec: FeatureSpec, sides: tuple[str, ...]) -> None:
        self.sparse: list[IdOperator | ComboOperator] = []
        self.dense: list[RawOperator] = []
        side_of = spec.sides()
        for feature in spec.features:
            if side_of[feature.name] not in sides:
                continue
            if isinstance(feature, Raw):
                self.dense.append(RawOperator(feature))
            elif isinstance(feature, Combo):
                self.sparse.append(ComboOperator(feature))
            else:
                self.sparse.append(IdOperator(feature, spec.columns))

    def apply(
        self, columns: Mapping[str, RawColumn], rows: int, reads: Mapping[str, NDArray[np.int64]], field_of: FieldOf
    ) -> SideBatch:
        """reads: per column, which of its rows each row of this side takes; only a combo asks."""
        sparse: dict[str, Ragged] = {}
        for operator in self.sparse:
            if isinstance(operator, ComboOperator):
                sparse[operator.name] = operator([(columns[name], reads[name]) for name in operator.columns])
            else:
                sparse[operator.name] = operator(columns[operator.column])
        dense = np.empty((rows, len(self.dense)), dtype=np.float32)
        for at, raw in enumerate(self.dense):
            bad = raw.write(columns[raw.column], dense, at)
            if bad >= 0:
                raise _not_finite(raw, columns[raw.column], bad, field_of(raw.column, bad))
        return SideBatch(rows, sparse, dense)


def _not_finite(raw: RawOperator, column: RawColumn, row: int, field: str) -> FeatureError:
    assert isinstance(column, Floats | Ints)
    found = f"{field}: found {column.values[row]} (row {row})"
    return FeatureError(f"{found}; feature {raw.name!r} has no finite value for it and no clip", field)


def _place(side: ColumnSide, row: int) -> str:
    return f"candidates[{row}]" if side == "item" else side


def _arrow_column(batch: pa.RecordBatch | pa.Table, name: str) -> Any:
    at = batch.schema.get_field_index(name)
    if at < 0:
        count = batch.schema.names.count(name)
        found = f"column {name!r} is there {count} times" if count else f"column {name!r} is missing"
        raise FeatureError(f"{found}{accepted(name, batch.schema.names)}", name)
    return batch.column(at)
