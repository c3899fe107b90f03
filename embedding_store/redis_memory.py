"""What the keys of a release take in a Redis 7, counted as its allocator (jemalloc) rounds.

Beside the bytes of a string there are its header, the object, the key and the key's place in the dictionary: some 100
bytes a page. Measured beside a real server by tests/embedding_store/test_redis_memory.py.
"""

from __future__ import annotations

from math import exp, lgamma, log

from embedding_store.buckets import HEAD_BYTES, ID_BYTES
from embedding_store.redis_keys import page_key
from embedding_store.release import TableInfo

_OBJECT = 16
_ENTRY = 24  # of the dictionary
_CLUSTER_ENTRY = 40  # a cluster's also has the keys before and behind in the same slot
_EMBEDDED = 44  # bytes of a string that lies in its object's allocation
_POINTER = 8
_NAMESPACE = "0" * 16


def allocated(size: int) -> int:
    """What jemalloc gives for `size` bytes: four classes between a power of two and the next, multiples of 16 below."""
    if size <= 8:
        return 8
    if size <= 128:
        return -(-size // 16) * 16
    step = 1 << ((size - 1).bit_length() - 3)
    return -(-size // step) * step


def string_bytes(length: int) -> int:
    """Of a value, object and all."""
    if length <= _EMBEDDED:
        return allocated(_OBJECT + _sds(length, least=8))
    return allocated(_OBJECT) + allocated(_sds(length, least=8))


def table_bytes(table: TableInfo, *, prefix: str = "torchrank", cluster: bool = False) -> int:
    """Of all keys of a table in one release: its pages, or its buckets, and the hot list."""
    keys = table.pages + bool(table.hot_ids)
    name = _sds(len(page_key(prefix, _NAMESPACE, table.name, table.pages - 1)), least=5)
    slots = _POINTER << (max(1, keys) - 1).bit_length()  # as if no other table filled the dictionary
    values = _bucket_bytes(table) if table.sparse else _page_bytes(table)
    if table.hot_ids:
        values += string_bytes(8 * table.hot_ids)
    return round(values) + slots + keys * (allocated(name) + allocated(_CLUSTER_ENTRY if cluster else _ENTRY))


def _sds(length: int, *, least: int) -> int:
    """A string of Redis with its header and the zero behind it; values have no header of the smallest kind."""
    header = 1 if length < 1 << 5 and least == 5 else 3 if length < 1 << 8 else 5 if length < 1 << 16 else 9
    return header + length + 1


def _page_bytes(table: TableInfo) -> int:
    last = table.rows - (table.pages - 1) * table.page_rows
    return (table.pages - 1) * string_bytes(table.page_rows * table.stored_bytes) + string_bytes(
        last * table.stored_bytes
    )


def _bucket_bytes(table: TableInfo) -> float:
    """Rows fall into buckets at random: a bucket's number of them has Poisson's distribution."""
    mean = table.rows / table.pages
    most = int(mean + 12 * mean**0.5 + 12)
    chances = (exp(count * log(mean) - mean - lgamma(count + 1)) for count in range(most))
    sizes = (string_bytes(HEAD_BYTES + count * (ID_BYTES + table.stored_bytes)) for count in range(most))
    return table.pages * sum(chance * size for chance, size in zip(chances, sizes, strict=True))
