"""Fixtures of the tests of training."""

from __future__ import annotations

import pytest

from torchrank.training.quiet import quiet_libraries


@pytest.fixture(autouse=True)
def quiet() -> None:
    quiet_libraries()
