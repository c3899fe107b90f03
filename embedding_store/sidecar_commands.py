"""The commands of the sidecar: arguments in, an encoded reply out. Nothing here knows sockets.

What is answered from memory is answered at once, in the event loop. What may wait for a store goes to a thread and
comes back as a future, so that one slow fetch holds up no other connection.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from embedding_store import resp
from embedding_store.errors import StoreError
from embedding_store.protocol import error_code
from embedding_store.served import ServedLookup
from embedding_store.sidecar_greetings import Greetings
from embedding_store.sidecar_info import Sections, info_sections, info_text
from embedding_store.sidecar_lookup import Lookups
from embedding_store.sidecar_ready import Readiness
from embedding_store.sidecar_releases import ServedReleases
from embedding_store.sidecar_session import Arguments, CommandError, Reply, Session, shown, text_of
from embedding_store.sidecar_stats import SidecarStats

_log = logging.getLogger(__name__)

_BEFORE_AUTH = (b"AUTH", b"HELLO", b"QUIT")


class Commands:
    def __init__(
        self,
        store: ServedLookup,
        *,
        threads: ThreadPoolExecutor,
        max_frame: int,
        password: bytes | None,
        server: Mapping[str, object],
        max_degraded_share: float,
        poll_seconds: float,
    ) -> None:
        """server: what INFO and HELLO say about this process; `version` is one of its keys."""
        self.stats = SidecarStats()
        self.ready = Readiness(self.stats.degraded, max_degraded_share)
        self.releases = ServedReleases(store, threads, poll_seconds)
        self._lookups = Lookups(store, self.releases, threads, max_frame, self.stats)
        self._store = store
        self._threads = threads
        self._server = server
        self._greetings = greetings = Greetings(password, server)
        # name -> (method, fewest arguments, most arguments), the name itself not counted
        self._table: dict[bytes, tuple[Callable[[Session, Arguments], Reply | asyncio.Future[Reply]], int, int]] = {
            b"TR.LOOKUP": (self._lookup, 1, 1),
            b"TR.INFO": (self._release_info, 0, 1),
            b"TR.RELEASES": (self._list_releases, 0, 0),
            b"TR.READY": (self._ready, 0, 0),
            b"INFO": (self._info, 0, 1),
            b"COMMAND": (self._command, 0, 32),
            b"PING": (greetings.ping, 0, 1),
            b"HELLO": (greetings.hello, 0, 6),
            b"AUTH": (greetings.auth, 1, 2),
            b"CLIENT": (greetings.client, 1, 4),
            b"QUIT": (greetings.quit, 0, 0),
        }

    def session(self) -> Session:
        self.stats.connections_total += 1
        return Session(self.stats.connections_total, self._greetings.open_to_all)

    def answer(self, session: Session, command: Arguments) -> Reply | asyncio.Future[Reply]:
        """Never raises, and neither does the future: what goes wrong becomes an error reply."""
        self.stats.commands += 1
        name = bytes(command[0]).upper()
        try:
            if name not in self._table:
                known = ", ".join(known.decode() for known in self._table)
                raise CommandError(f"unknown command '{shown(command[0])}'; known are: {known}")
            method, fewest, most = self._table[name]
            if not session.authenticated and name not in _BEFORE_AUTH:
                raise CommandError("Authentication required.", "NOAUTH")
            if not fewest <= len(command) - 1 <= most:
                raise CommandError(f"wrong number of arguments for '{shown(command[0])}'")
            return method(session, command[1:])
        except Exception as error:  # noqa: BLE001  # _failed logs what nobody expected; one bad request ends no other's
            return self._failed(error)

    def refusal(self, code: str, message: str) -> bytes:
        """An error reply, counted."""
        self.stats.errors[code] += 1
        return resp.error(code, message)

    def sections(self) -> Sections:
        """What INFO says."""
        releases = self.releases
        return info_sections(
            self.stats, self._store.stats(), self._server, releases.shapes(), self.ready.obstacle,
            releases.unknown_tables(),
        )  # fmt: skip

    def _failed(self, error: BaseException) -> bytes:
        if isinstance(error, CommandError):
            return self.refusal(error.code, str(error))
        if isinstance(error, StoreError):
            return self.refusal(error_code(error), str(error))
        _log.error("internal error", exc_info=error)
        return self.refusal("ERR", f"internal error: {type(error).__name__}")

    async def _guarded(self, work: Awaitable[Reply]) -> Reply:
        try:
            return await work
        except Exception as error:  # noqa: BLE001  # _failed logs what nobody expected
            return self._failed(error)

    def _in_thread(self, work: Callable[[], Reply]) -> asyncio.Future[Reply]:
        return asyncio.ensure_future(self._guarded(asyncio.get_running_loop().run_in_executor(self._threads, work)))

    def _lookup(self, session: Session, arguments: Arguments) -> Reply | asyncio.Future[Reply]:
        found = self._lookups.answer(arguments[0])
        return found if isinstance(found, bytearray) else asyncio.ensure_future(self._guarded(found))

    def _release_info(self, session: Session, arguments: Arguments) -> Reply | asyncio.Future[Reply]:
        """`TR.INFO MODEL@VERSION`, `TR.INFO MODEL` for its active release, `TR.INFO` where only one model is served.

        At once where the manifest is known: clients that start ask for it, also while every thread waits for the store.
        """
        name = text_of(arguments[0]) if arguments else None
        release = name if name is not None and "@" in name else self.releases.told(name)
        known = self.releases.manifests.get(release) if release is not None else None
        if known is not None:
            return _json(known)
        return self._in_thread(lambda: _json(self.releases.manifest(release, None if release is not None else name)))

    def _list_releases(self, session: Session, arguments: Arguments) -> asyncio.Future[Reply]:
        def work() -> Reply:
            return _json([self.releases.entry(stored) for stored in self._store.releases()])

        return self._in_thread(work)

    def _ready(self, session: Session, arguments: Arguments) -> Reply:
        if self.ready.obstacle:
            raise CommandError(self.ready.obstacle, "NOTREADY")
        return resp.simple("READY")

    def _info(self, session: Session, arguments: Arguments) -> Reply:
        wanted = text_of(arguments[0]).lower() if arguments else None
        return resp.bulk(info_text(self.sections(), wanted).encode())

    def _command(self, session: Session, arguments: Arguments) -> Reply:
        """COMMAND lists names and arities; of its subcommands only COUNT has an answer, the others' is empty."""
        action = bytes(arguments[0]).upper() if arguments else b""
        if action == b"COUNT":
            return resp.integer(len(self._table))
        if action:
            return resp.array(())
        return resp.array(
            resp.array(
                (
                    resp.bulk(name.lower()),
                    resp.integer(fewest + 1 if fewest == most else -(fewest + 1)),
                    resp.array((resp.simple("readonly"),)),
                    *[resp.integer(0)] * 3,  # no argument is a key
                    *[resp.array(())] * 4,  # nor are there ACL categories, tips, key specifications, subcommands
                )
            )
            for name, (_, fewest, most) in self._table.items()
        )


def _json(content: object) -> bytes:
    """Indented: people read it, too."""
    return resp.bulk(msgspec.json.format(msgspec.json.encode(content), indent=1))
