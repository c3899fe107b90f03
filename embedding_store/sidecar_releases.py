"""Which release of each model this sidecar tells its clients, and which ones are warm.

A release that is activated while the process runs is warmed beside the one in use, and told only then. Whoever names a
release in a look-up is answered from it at any time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import numpy as np

from embedding_store.errors import StoreError
from embedding_store.release import ReleaseEntry, ReleaseManifest
from embedding_store.served import ServedLookup

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class ServedReleases:
    """Written by the event loop alone; what may wait for a store runs in `threads`.

    manifests: of the releases that were warmed or asked for. active: model -> release, as TR.INFO tells it.
    warmed: release -> rows that its cache held when it was warm.
    """

    def __init__(self, store: ServedLookup, threads: ThreadPoolExecutor) -> None:
        self._store = store
        self._threads = threads
        self._reachable = True
        self.manifests: dict[str, ReleaseManifest] = {}
        self.active: dict[str, str] = {}
        self.warmed: dict[str, int] = {}

    async def follow(self, seconds: float) -> None:
        """Asks the store every `seconds`, until it is cancelled; 0: never."""
        while seconds:
            await asyncio.sleep(seconds)
            try:
                for release in await self.move():
                    _log.info("%s is active now; %d rows are warm", release, self.warmed[release])
            except StoreError as error:
                if self._reachable:
                    _log.warning("cannot see which releases are active: %s", error)
                self._reachable = False
            except Exception:  # noqa: BLE001  # logged; the sidecar goes on with the releases that it has
                _log.exception("newly activated releases were not looked for")
            else:
                self._reachable = True

    async def move(self) -> list[str]:
        """Once: warms what the store says is active, and then tells it. Returns what is new. Raises StoreError."""
        moved = []
        for model, release in (await self._in_thread(self._store.active)).items():
            if self.active.get(model) != release:
                self.warmed[release] = await self._in_thread(functools.partial(self._warm, release))
                self.active[model] = release
                moved.append(release)
        return moved

    def told(self, model: str | None) -> str | None:
        """The active release of `model`, of the only model where None; None where this sidecar cannot say."""
        if model is None and len(self.active) == 1:
            return next(iter(self.active.values()))
        return self.active.get(model) if model is not None else None

    def manifest(self, release: str | None, model: str | None = None) -> ReleaseManifest:
        """As EmbeddingLookup.manifest, and remembers it. May wait for a network where it is not among `manifests`."""
        if release is not None and release in self.manifests:
            return self.manifests[release]
        manifest = self._store.manifest(release, model=model)
        self.manifests[manifest.name] = manifest  # a release never changes
        return manifest

    def shapes(self) -> dict[str, str]:
        """What INFO says of each of `manifests`."""
        return {
            name: f"tables={len(manifest.tables)},rows={sum(table.rows for table in manifest.tables)},"
            f"bytes={sum(table.bytes for table in manifest.tables)},active={int(name in self.active.values())},"
            f"warm={int(name in self.warmed)},warmed_rows={self.warmed.get(name, 0)}"
            for name, manifest in sorted(self.manifests.items())
        }

    def entry(self, stored: ReleaseEntry) -> ReleaseEntry:
        """A line of the store's list, with what is active and warm here."""
        active = self.active.get(stored.model, stored.release if stored.active else None) == stored.release
        return msgspec.structs.replace(stored, active=active, warm=stored.release in self.warmed)

    def _warm(self, release: str) -> int:
        rows = self._store.warm(release)
        # One look-up, so that kernels are compiled and files mapped before the first client waits for it.
        some = np.array([0, -1], np.int64)
        self._store.lookup(release, {table.name: some for table in self.manifest(release).tables})
        return rows

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
