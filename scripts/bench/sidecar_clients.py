"""Many clients of one server at the same time, each a process of its own, as fast as it is answered."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedding_store.lookup import EmbeddingLookup
from scripts.bench.sidecar_store import RELEASE, Request

Seconds = NDArray[np.float64]


class Load(NamedTuple):
    lookups_per_s: float
    p50_ms: float
    p99_ms: float


def measure_clients(
    connect: Callable[..., EmbeddingLookup],
    arguments: tuple[Any, ...],
    requests: Callable[..., list[Request]],
    shares: list[tuple[Any, ...]],
    seconds: float,
) -> Load:
    """connect(*arguments) makes a client, requests(*share) what it asks, over and over; one client per share.

    Both run in the client's process: they have to be importable.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for share in shares:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_client, args=(theirs, connect, arguments, requests, share, seconds))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()  # warmed up
    for pipe in pipes:
        pipe.send("go")
    latencies = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    merged = np.concatenate(latencies)
    rate = sum(len(some) / some.sum() for some in latencies)
    return Load(round(rate, 1), *(round(float(np.percentile(merged, share)) * 1e3, 4) for share in (50, 99)))


def _client(
    pipe: Connection,
    connect: Callable[..., EmbeddingLookup],
    arguments: tuple[Any, ...],
    requests: Callable[..., list[Request]],
    share: tuple[Any, ...],
    seconds: float,
) -> None:
    asked = requests(*share)
    with connect(*arguments) as lookup:
        for request in asked[:50]:
            lookup.lookup(RELEASE, request)
        pipe.send("ready")
        pipe.recv()
        latencies: list[float] = []
        end = time.perf_counter() + seconds
        now = time.perf_counter()
        while now < end:
            lookup.lookup(RELEASE, asked[len(latencies) % len(asked)])
            before, now = now, time.perf_counter()
            latencies.append(now - before)
        pipe.send(np.array(latencies))
