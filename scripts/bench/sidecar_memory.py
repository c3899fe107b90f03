"""What a sidecar holds in memory while it serves tables that are much larger: its own, and mapped files apart."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from embedding_store.client import SidecarClient
from embedding_store.open import open_backend
from scripts.bench.sidecar_store import RELEASE, Shape, publish, running, store_url, zipf_ids

_ROUNDS = 10
_DRAWN = 20_000  # look-ups whose ids are drawn at once


def measure_memory(
    kind: str, shape: Shape, *, cache_bytes: int, lookups: int, ids: int, exponent: float, clients: int
) -> dict[str, float]:
    """Resident bytes of the sidecar after `lookups` look-ups of `ids` ids, drawn from a Zipf distribution.

    peak_*: the most that was seen after any tenth of them.
    """
    with tempfile.TemporaryDirectory() as folder, store_url(kind, Path(folder)) as url:
        with open_backend(url) as backend:
            publish(backend, shape, {name: np.empty(0, np.int64) for name in shape.names})
        socket = f"{folder}/s.sock"
        arguments = ("--store", url, "--socket", socket, "--cache-size", str(cache_bytes), "--threads", str(clients))
        with running("torchrank.cli", "sidecar", *arguments), SidecarClient(socket, timeout=60) as client:
            seen, began = [_resident(client)], time.perf_counter()
            for number in range(_ROUNDS):
                _load(client, shape, lookups // _ROUNDS, ids, exponent, clients, seed=number)
                seen.append(_resident(client))
            info = client.info()
            return {
                "table_bytes": shape.tables * shape.rows * shape.row_bytes,
                "cache_budget": cache_bytes,
                "cache_bytes": int(info["cache_bytes"]),
                "lookups": int(info["lookups"]),
                "ids": int(info["ids"]),
                "hit_rate": float(info["cache_hit_rate"]),
                "seconds": round(time.perf_counter() - began, 1),
                "at_start_bytes": seen[0][0],
                "resident_bytes": seen[-1][0],
                "anonymous_bytes": seen[-1][1],
                "mapped_bytes": seen[-1][0] - seen[-1][1],
                "peak_resident_bytes": max(resident for resident, _ in seen),
                "peak_anonymous_bytes": max(anonymous for _, anonymous in seen),
                "above_cache_bytes": max(resident for resident, _ in seen) - cache_bytes,
                "own_above_cache_bytes": max(anonymous for _, anonymous in seen) - cache_bytes,
            }


def _resident(client: SidecarClient) -> tuple[int, int]:
    info = client.info()
    return int(info["used_memory_rss"]), int(info["used_memory_rss_anonymous"])


def _load(
    client: SidecarClient, shape: Shape, lookups: int, ids: int, exponent: float, clients: int, seed: int
) -> None:
    per_table = ids // shape.tables

    def work(number: int) -> None:
        rng = np.random.default_rng((seed, number))
        left = lookups // clients
        while left:
            some = min(left, _DRAWN)
            drawn = zipf_ids(rng, exponent, shape.rows, some * ids).reshape(some, shape.tables, per_table)
            for row in drawn:
                client.lookup(RELEASE, dict(zip(shape.names, row, strict=True)))
            left -= some

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
