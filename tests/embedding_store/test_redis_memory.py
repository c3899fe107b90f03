"""The memory that a table is said to take in Redis, beside what a real server says that it uses."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
import redis

from embedding_store.buckets import HEAD_BYTES, ID_BYTES, buckets_of
from embedding_store.codec import bucket_rows, page_rows
from embedding_store.redis_keys import page_key
from embedding_store.redis_memory import allocated, table_bytes
from embedding_store.release import TableInfo
from tests.redis_server import RedisServer


def table_of(row_bytes: int, rows: int, *, sparse: bool) -> TableInfo:
    in_page = bucket_rows(row_bytes) if sparse else page_rows(row_bytes)
    return TableInfo(
        name="item_id", rows=rows, dim=row_bytes, codec="fp32", row_bytes=row_bytes, page_rows=in_page, sha256="",
        ids="sparse" if sparse else "dense", hot_ids=1000,
    )  # fmt: skip


def string_lengths(table: TableInfo) -> Iterator[int]:
    if table.sparse:
        ids = np.random.default_rng(7).integers(-(2**63), 2**63, table.rows, np.int64)
        counts = np.bincount(buckets_of(ids, table.pages), minlength=table.pages)
        yield from (HEAD_BYTES + counts * (ID_BYTES + table.stored_bytes)).tolist()
    else:
        for page in range(table.pages):
            yield min(table.page_rows, table.rows - page * table.page_rows) * table.stored_bytes


def used_memory(client: redis.Redis) -> int:
    """When the dictionary is no longer growing into a new one."""
    used = -1
    while used != (used := client.info("memory")["used_memory"]):
        time.sleep(0.2)
    return used


@pytest.mark.parametrize("row_bytes", [4, 20, 32, 64, 128, 256, 516, 3000, 12000])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_takes_what_a_server_says(row_bytes: int, sparse: bool, redis_server: RedisServer) -> None:
    table = table_of(row_bytes, 8_000_000 // (row_bytes + 8 * sparse), sparse=sparse)
    with redis_server.client() as client:
        before = used_memory(client)
        pipeline = client.pipeline(transaction=False)
        pipeline.set(page_key("torchrank", "0123456789abcdef", table.name, "hot"), bytes(8000))
        for page, length in enumerate(string_lengths(table)):
            pipeline.set(page_key("torchrank", "0123456789abcdef", table.name, page), bytes(length))
            if page % 500 == 0:
                pipeline.execute()
        pipeline.execute()
        measured = used_memory(client) - before
    assert table_bytes(table) == pytest.approx(measured, rel=0.01)


def test_the_allocators_classes() -> None:
    """As jemalloc 5 documents them, TABLE "Size classes"."""
    classes = [8, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    classes += [1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288, 14336, 16384]
    for size in range(1, 16385):
        assert allocated(size) == next(found for found in classes if found >= size)
