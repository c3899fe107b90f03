"""What lies in a Redis store, who needs it, and its removal."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, cast

import msgspec

from embedding_store import redis_scripts as scripts
from embedding_store.backend import Stored, namespace
from embedding_store.errors import ReleaseConflict
from embedding_store.redis_keys import Pin, Record, decode_record, page_key

if TYPE_CHECKING:
    from embedding_store.redis_backend import RedisBackend

_BATCH = 256  # UNLINKs at once: 2 MiB of pages, which a background thread of the server gives back


class RedisShelf:
    def __init__(self, backend: RedisBackend) -> None:
        self._backend = backend

    def inventory(self) -> list[Stored]:
        since = {name.decode(): int(value) for name, value in self._all("since").items()}
        now = self._now()

        def idle(name: str) -> float:
            return max(0, now - since.get(name, now)) / 1000

        ready = [
            Stored(record.manifest.name, record.namespace, "ready", record.manifest, idle(record.manifest.name))
            for record in self._records("releases")
        ]
        unfinished = [
            Stored(record.manifest.name, record.namespace, "unfinished", record.manifest, idle(content), leased)
            for record in self._records("writing")
            for content, leased in [self._lease(record)]
        ]
        removing = [
            Stored(record.manifest.name, record.namespace, "removing", record.manifest, 0)
            for record in self._records("removing")
        ]
        return ready + unfinished + removing

    def take_out(self, stored: Stored) -> None:
        assert stored.manifest is not None, "records in a Redis have one"
        content = namespace(stored.manifest)
        if stored.state == "ready":
            script, arguments = scripts.TAKE_OUT_RELEASE, (stored.release, stored.namespace, content)
            keys: tuple[str, ...] = ("releases", "active", "pins", "removing", "removed", "since")
        else:
            script, arguments = scripts.TAKE_OUT_UNFINISHED, (content, stored.namespace, stored.release)
            keys = ("writing", f"{content}:lease", "removing", "removed", "since", "releases")
        with self._backend.errors():
            refused = cast(bytes, self._backend.run(script, keys, *arguments)).decode()
        if refused:
            raise ReleaseConflict(f"{self._backend.address}: {stored.release} {refused}")

    def erase(self, stored: Stored) -> Iterator[int]:
        keys = self._page_keys(stored)
        while batch := list(itertools.islice(keys, _BATCH)):
            with self._backend.errors(), self._backend.control.pipeline(transaction=False) as pipeline:
                for key in batch:
                    pipeline.unlink(key)
                pipeline.execute()
            yield len(batch)
        with self._backend.errors():
            self._backend.control.delete(self._backend.key(stored.namespace, "verified"))
            self._backend.control.hdel(self._backend.key("removing"), stored.namespace)

    def pin(self, owner: str, releases: Collection[str], seconds: float) -> frozenset[str]:
        """No script: a user who may only read needs no more rights than HSET and HDEL on this one key."""
        key = self._backend.key("pins")
        if not releases:
            with self._backend.errors():
                self._backend.control.hdel(key, owner)
            return frozenset()
        pin = Pin(sorted(releases), self._now() + round(seconds * 1000))
        with self._backend.errors():
            self._backend.control.hset(key, owner, cast(str, msgspec.json.encode(pin)))
            there = cast(list[bytes], self._backend.control.hkeys(self._backend.key("releases")))
        return frozenset(releases) & {name.decode() for name in there}

    def pins(self) -> dict[str, list[str]]:
        owners: dict[str, list[str]] = {}
        found = self._all("pins")
        now = self._now()
        for owner, value in sorted(found.items()):
            pin = msgspec.json.decode(value, type=Pin)
            for release in pin.releases if pin.until > now else ():
                owners.setdefault(release, []).append(owner.decode())
        return owners

    def _page_keys(self, stored: Stored) -> Iterator[str]:
        for table in stored.manifest.tables if stored.manifest else ():
            for page in range(table.pages):
                yield page_key(self._backend.prefix, stored.namespace, table.name, page)
            yield page_key(self._backend.prefix, stored.namespace, table.name, "hot")

    def _all(self, key: str) -> dict[bytes, bytes]:
        with self._backend.errors():
            return cast(dict[bytes, bytes], self._backend.control.hgetall(self._backend.key(key)))

    def _records(self, key: str) -> list[Record]:
        records = [decode_record(self._backend.address, name.decode(), value) for name, value in self._all(key).items()]
        return sorted(records, key=lambda record: (record.manifest.name, record.namespace))

    def _lease(self, record: Record) -> tuple[str, bool]:
        """CONTENT of a publication, and whether somebody is at work on it."""
        content = namespace(record.manifest)
        with self._backend.errors():
            return content, bool(self._backend.control.exists(self._backend.key(content, "lease")))

    def _now(self) -> int:
        """Milliseconds by the clock that the scripts go by: in a cluster, that of the node which has our keys."""
        with self._backend.errors():
            control: Any = self._backend.control
            node = (
                {"target_nodes": control.get_node_from_key(self._backend.key("since"))} if self._backend.cluster else {}
            )
            seconds, microseconds = control.time(**node)
        return int(seconds) * 1000 + int(microseconds) // 1000
