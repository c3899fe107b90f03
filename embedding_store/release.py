"""What a release is made of: the tables' geometry, as the bundle's `manifest.json` states it.

A bundle's manifest has more keys (features, graph variants, …); this package reads only these.
"""

from __future__ import annotations

import builtins  # TableInfo has a property named bytes
from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

Codec = Literal["fp32", "fp16", "int8"]
CHECK_BYTES: Final = 2  # behind each stored row: see row_checks.py


class TableInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table: its encoded rows in `tables/NAME.pages`, each with its check behind it (`row_checks.py`), one after
    another without header or padding, so that row i starts at byte `i * stored_bytes`; `tables/NAME.hot` holds
    little-endian int64 ids, most frequent first.

    dense: the ids are 0 … rows-1. The rows are cut in pages of `page_rows` rows (the last may be shorter).
    sparse: any int64 may be an id. `tables/NAME.ids` holds those of the rows, little-endian int64, in the order that
    `sparse.py` describes. A Redis keeps the rows in `pages` buckets of `page_rows` rows on average (`buckets.py`).
    """

    name: str
    rows: Annotated[int, msgspec.Meta(ge=1)]
    dim: Annotated[int, msgspec.Meta(ge=1)]
    codec: Codec
    row_bytes: Annotated[int, msgspec.Meta(ge=1)]  # of an encoded row, without its check
    page_rows: Annotated[int, msgspec.Meta(ge=1)]
    sha256: str  # of the .pages file
    hot_ids: int = 0  # how many ids the .hot file holds
    default_row: builtins.bytes = b""  # encoded, row_bytes long; empty means zeros
    ids: Literal["dense", "sparse"] = "dense"
    ids_sha256: str = ""  # of the .ids file, where there is one
    # Always written, so that a reader from before the checks refuses the table as one with an unknown field. UNSET of a
    # table from that time: see `decode_manifest`.
    check_bytes: Literal[2] | UnsetType = CHECK_BYTES

    @property
    def sparse(self) -> bool:
        return self.ids == "sparse"

    @property
    def pages(self) -> int:
        return -(-self.rows // self.page_rows)

    @property
    def stored_bytes(self) -> int:
        """Of a row with its check."""
        return self.row_bytes + (self.check_bytes or 0)

    @property
    def bytes(self) -> int:
        """Of the .pages file."""
        return self.rows * self.stored_bytes

    @property
    def ids_bytes(self) -> int:
        """Of the .ids file."""
        return 8 * self.rows if self.sparse else 0


class ReleaseManifest(msgspec.Struct, frozen=True):
    """The part of a bundle's manifest that a store keeps. Unknown keys are ignored on purpose: see above."""

    model: str
    version: str
    created: str  # UTC, ISO 8601
    tables: tuple[TableInfo, ...]

    @property
    def name(self) -> str:
        return f"{self.model}@{self.version}"

    @property
    def is_current(self) -> bool:
        """Whether its rows have checks, without which they are not served."""
        return all(table.check_bytes is not UNSET for table in self.tables)

    @property
    def places(self) -> dict[str, int]:
        """Table name -> place in `tables`."""
        return {table.name: place for place, table in enumerate(self.tables)}

    def table(self, name: str) -> TableInfo:
        for table in self.tables:
            if table.name == name:
                return table
        from embedding_store.errors import UnknownTable

        names = ", ".join(table.name for table in self.tables)
        raise UnknownTable(f"release {self.name} has no table {name!r}; it has: {names}")


def decode_manifest(content: builtins.bytes | msgspec.Raw) -> ReleaseManifest:
    """Out of JSON, also that of an older torchrank (`is_current`): it can be listed and removed. Encoded again it is
    what it was, as namespaces have it. Raises msgspec.DecodeError."""
    manifest = msgspec.json.decode(content, type=ReleaseManifest)
    stated = msgspec.json.decode(content, type=_Stated)
    tables = zip(manifest.tables, stated.tables, strict=True)
    return msgspec.structs.replace(
        manifest, tables=tuple(msgspec.structs.replace(table, check_bytes=its.check_bytes) for table, its in tables)
    )


class _StatedTable(msgspec.Struct):
    check_bytes: Literal[2] | UnsetType = UNSET


class _Stated(msgspec.Struct):
    tables: tuple[_StatedTable, ...]


class ReleaseEntry(msgspec.Struct, frozen=True):
    """One line of a list of releases."""

    release: str  # model@version
    model: str
    version: str
    created: str  # UTC, ISO 8601
    active: bool
    warm: bool = False  # where a sidecar tells it: it has loaded the hot rows
