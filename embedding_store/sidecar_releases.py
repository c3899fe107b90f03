"""Which release of each model this sidecar tells its clients, and which ones are warm.

A release that is activated while the process runs is warmed beside the one in use, and told only then. Whoever names a
release in a look-up is answered from it at any time. Releases in use are pinned in the store, so that nobody removes
them; the others are forgotten, but for the one before the active, which a rollback finds warm.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import numpy as np

from embedding_store.errors import StoreError
from embedding_store.holding import PIN_SECONDS, owner_name
from embedding_store.release import ReleaseEntry, ReleaseManifest
from embedding_store.served import ServedLookup

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

IN_USE_SECONDS = 600.0  # since the last look-up that named a release


class ServedReleases:
    """Written by the event loop alone, but for `manifests`: threads add to it, and what goes over it goes over a copy.
    What may wait for a store runs in `threads`.

    manifests: of the releases that were warmed or asked for. active: model -> release, as TR.INFO tells it.
    warmed: release -> rows that its cache held when it was warm. used: release -> when a look-up named it last,
    time.perf_counter().
    """

    def __init__(self, store: ServedLookup, threads: ThreadPoolExecutor, poll_seconds: float = 0.0) -> None:
        self._poll_seconds = poll_seconds
        self._store = store
        self._threads = threads
        self._reachable = True
        self.manifests: dict[str, ReleaseManifest] = {}
        self.active: dict[str, str] = {}
        self.warmed: dict[str, int] = {}
        self.used: dict[str, float] = {}
        self._before: dict[str, str] = {}  # model -> the release that was active before
        self._owner = owner_name()
        self._held = True
        self._cold: set[str] = set()  # releases that could not be warmed, as was logged
        self._unknown: set[str] = set()  # tables of the policy that there are not, as was logged

    async def follow(self) -> None:
        """Asks the store every `poll_seconds`, until it is cancelled. 0: never, but pins what is in use."""
        while True:
            await asyncio.sleep(self._poll_seconds or PIN_SECONDS / 3)
            if not self._poll_seconds:
                await self._hold(())
                continue
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
        """Once: warms what the store says is active, and then tells it. Returns what is new.

        A release that cannot be warmed is not told, which is logged, and does not keep the other models' back. Raises
        StoreError, also where no release can be told at all.
        """
        active = await self._in_thread(self._store.active)
        await self._hold(active.values())
        new = {model: release for model, release in active.items() if self.active.get(model) != release}
        if new:
            await self._in_thread(functools.partial(self._store.expect, list(new.values())))
        failures: dict[str, StoreError] = {}
        for model, release in new.items():
            try:
                self.warmed[release] = await self._in_thread(functools.partial(self._warm, release))
            except StoreError as error:
                failures[release] = error
                continue
            if model in self.active:
                self._before[model] = self.active[model]
            self.active[model] = release
        self._report(failures)
        await self._forget()
        self._report_unknown_tables()
        return [release for release in new.values() if release not in failures]

    def _report(self, failures: Mapping[str, StoreError]) -> None:
        """Once each; raises where nothing is left to be served."""
        for release, error in failures.items():
            if not self.active:
                raise error
            if release not in self._cold:
                _log.warning("%s is not told, for it cannot be warmed: %s", release, error)
        self._cold = set(failures)

    def unknown_tables(self) -> set[str]:
        """Those that --on-unavailable names and none of `manifests` has: misspelt, or of a release that is still to
        come. Empty where there is no release yet."""
        named = self._store.policy_tables
        manifests = list(self.manifests.values()) if named else []
        return set(named).difference(*(manifest.places for manifest in manifests)) if manifests else set()

    def _report_unknown_tables(self) -> None:
        """Once each, and again where a table was there meanwhile."""
        unknown = self.unknown_tables()
        if unknown - self._unknown:
            manifests = dict(self.manifests)
            there = sorted({table for manifest in manifests.values() for table in manifest.places})
            _log.warning(
                "--on-unavailable names %s, which no release in use has (%s); their tables are: %s",
                ", ".join(map(repr, sorted(unknown))), ", ".join(sorted(manifests)), ", ".join(there),
            )  # fmt: skip
        self._unknown = unknown

    async def release_all(self) -> None:
        """The pins end with the process, not a minute later."""
        with contextlib.suppress(StoreError):
            await self._in_thread(functools.partial(self._store.hold, self._owner, (), PIN_SECONDS))

    async def _hold(self, active: Iterable[str]) -> None:
        """Pins what is in use. Where that fails (a user who may only read) the sidecar serves all the same."""
        seconds = max(PIN_SECONDS, 3 * self._poll_seconds)
        try:
            await self._in_thread(
                functools.partial(self._store.hold, self._owner, self._in_use() | set(active), seconds)
            )
        except StoreError as error:
            if self._held:
                _log.warning("releases in use are not pinned, torchrank gc may remove them: %s", error)
            self._held = False
        else:
            self._held = True

    def _in_use(self) -> set[str]:
        now = time.perf_counter()
        recent = {release for release, used in self.used.items() if now - used < IN_USE_SECONDS}
        return recent | set(self.active.values())

    async def _forget(self) -> None:
        for release in set(self.manifests) - self._in_use() - set(self._before.values()):
            self.manifests.pop(release)
            self.warmed.pop(release, None)
            self.used.pop(release, None)
            await self._in_thread(functools.partial(self._store.forget, release))

    def told(self, model: str | None) -> str | None:
        """The active release of `model`, of the only model where None; None where this sidecar cannot say."""
        if model is None and len(self.active) == 1:
            return next(iter(self.active.values()))
        return self.active.get(model) if model is not None else None

    def manifest(
        self, release: str | None, model: str | None = None, *, timeout: float | None = None
    ) -> ReleaseManifest:
        """As ServedLookup.manifest, and remembers it. May wait for a network where it is not among `manifests`."""
        known = self.manifests.get(release) if release is not None else None
        if known is not None:
            return known
        manifest = self._store.manifest(release, model=model, timeout=timeout)
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
