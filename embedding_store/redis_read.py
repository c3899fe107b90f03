"""Rows out of a Redis: an IdBatch becomes commands for pages, their replies become rows."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence

from embedding_store.backend import NodeStats
from embedding_store.batch import FetchedRows, IdBatch
from embedding_store.closing import Closing
from embedding_store.errors import StoreUnavailable
from embedding_store.redis_connection import tls_context
from embedding_store.redis_fetch import PageFetch, PageKeys, compile_kernels
from embedding_store.redis_keys import Record
from embedding_store.redis_node import RedisNode
from embedding_store.redis_rights import refusal
from embedding_store.redis_url import RedisAddress
from embedding_store.talks import Talk, Talks, run

_MOST_RELEASES = 64  # whose keys are kept


class PageReader(Closing):
    """Thread-safe."""

    def __init__(self, address: RedisAddress) -> None:
        self.address = address
        self._keys: dict[str, PageKeys] = {}

    def fetch(self, record: Record, batch: IdBatch, *, timeout: float | None = None) -> FetchedRows:
        """See `Backend.fetch`."""
        compile_kernels()
        fetch = PageFetch(self._keys_of(record), batch)
        if fetch.size:
            limit = time.monotonic() + (self.address.timeout if timeout is None else timeout)
            talks = Talks()
            self._begin(talks, fetch, limit)
            talks.run()
        return fetch.result(self.address)

    def request(self, command: tuple[str, ...], *, timeout: float) -> object:
        """A command that reads one key, its first argument, and is not about rows: its reply, within `timeout` seconds.

        Raises StoreUnavailable, also where a node refuses it.
        """
        reply = run(self._request(command, time.monotonic() + timeout))
        if isinstance(reply, Exception):
            raise refusal(self.address, str(reply)) from reply
        return reply

    @abstractmethod
    def nodes(self) -> Sequence[NodeStats]: ...

    @abstractmethod
    def _begin(self, talks: Talks, fetch: PageFetch, limit: float) -> None:
        """Starts talks at whose end every row has come or `fetch` was told why it cannot."""

    @abstractmethod
    def _request(self, command: tuple[str, ...], limit: float) -> Talk[object]:
        """Error replies are returned. Raises StoreUnavailable."""

    def _keys_of(self, record: Record) -> PageKeys:
        keys = self._keys.get(record.namespace)
        if keys is None:
            if len(self._keys) >= _MOST_RELEASES:
                self._keys.clear()
            keys = self._keys[record.namespace] = PageKeys(self.address.prefix, record)
        return keys


class RedisReader(PageReader):
    """Of one server."""

    def __init__(self, address: RedisAddress) -> None:
        super().__init__(address)
        self._node = RedisNode(address, tls_context(address))

    def nodes(self) -> Sequence[NodeStats]:
        return (self._node.stats(),)

    def close(self) -> None:
        self._node.close()

    def _begin(self, talks: Talks, fetch: PageFetch, limit: float) -> None:
        talks.start(self._ask(fetch, limit))

    def _request(self, command: tuple[str, ...], limit: float) -> Talk[object]:
        return self._node.request(command, limit)

    def _ask(self, fetch: PageFetch, limit: float) -> Talk[None]:
        try:
            refusals = yield from self._node.ask(fetch, fetch.all(), limit)
        except StoreUnavailable as unavailable:
            fetch.fail(unavailable)
        else:
            for line in refusals:
                fetch.fail(refusal(self.address, line))
