"""A client that was used before its process forked, as servers with several workers do."""

from __future__ import annotations

import os

import numpy as np

from embedding_store.client import SidecarClient


def test_both_sides_of_a_fork_get_their_own_rows(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    """Requests of one shape, whose replies would pass for each other's but for their rows."""
    client = sidecar.client()
    assert wrong_rows(client, release, 1, 1) == 0  # a connection is kept
    child = os.fork()
    if child == 0:
        mine = 255
        try:
            mine = wrong_rows(client, release, 5, 500)
        finally:
            os._exit(min(mine, 255))
    parents = wrong_rows(client, release, 6, 500)
    _, status = os.waitpid(child, 0)
    assert (parents, os.waitstatus_to_exitcode(status)) == (0, 0)


def wrong_rows(client: SidecarClient, release, row: int, times: int) -> int:  # type: ignore[no-untyped-def]
    """Of so many look-ups of one row."""
    ids = np.array([row])
    expected = release.expected("item", ids)
    found = (client.lookup(release.manifest.name, {"item": ids}).tables["item"].rows for _ in range(times))
    return sum(not np.array_equal(rows.view(np.float16), expected) for rows in found)
