"""A limit on bytes per second, so that publishing leaves the network and the store to those who read."""

from __future__ import annotations

import time
from collections.abc import Callable

_LONGEST_SLEEP = 1.0  # seconds; between two of them `meanwhile` is called


class Pace:
    def __init__(self, bytes_per_second: float | None) -> None:
        """None: as fast as it goes. Raises ValueError for 0 and less."""
        if bytes_per_second is not None and bytes_per_second <= 0:
            raise ValueError(f"rate limit {bytes_per_second:g}: accepted are more than 0 bytes a second")
        self._bytes_per_second = bytes_per_second
        self._free_at = time.monotonic()

    def wait(self, size: int, meanwhile: Callable[[], None]) -> None:
        """Returns when `size` more bytes may be sent: those before have had their time."""
        if self._bytes_per_second is None:
            return
        while (rest := self._free_at - time.monotonic()) > 0:
            time.sleep(min(rest, _LONGEST_SLEEP))
            meanwhile()
        self._free_at = max(self._free_at, time.monotonic()) + size / self._bytes_per_second
