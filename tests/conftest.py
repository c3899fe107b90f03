"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.redis_server import RedisServer


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A fresh, empty redis-server. Where none is installed the test fails: what needs Redis is not tested otherwise."""
    server = RedisServer()
    try:
        yield server
    finally:
        server.close()
