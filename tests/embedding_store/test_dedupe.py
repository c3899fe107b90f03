"""Distinct ids of a look-up against Python's own."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_store.dedupe import dedupe


@pytest.mark.parametrize("seed", range(20))
def test_dedupe(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.choice(
        np.concatenate((rng.integers(-(2**63), 2**63 - 1, 50), np.arange(20) * 2**40, [-1, 0, 2**63 - 1, -(2**63)])),
        int(rng.integers(0, 500)),
    )
    unique, index = dedupe(ids)
    np.testing.assert_array_equal(unique[index], ids)
    assert unique.tolist() == list(dict.fromkeys(ids.tolist()))
