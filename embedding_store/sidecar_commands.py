"""The commands of the sidecar: arguments in, an encoded reply out. Nothing here knows sockets.

What the store answers from this host's memory is answered at once, in the event loop. What may wait for a network goes
to a thread and comes back as a future, so that one slow fetch holds up no other connection.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import numpy as np

from embedding_store import resp
from embedding_store.errors import ProtocolError, StoreError, StoreUnavailable
from embedding_store.lookup import ABSENT, UNAVAILABLE, LookupReply
from embedding_store.protocol import (
    LookupRequest,
    decode_request,
    error_code,
    reply_bytes,
    status_of,
    write_reply,
)
from embedding_store.release import ReleaseManifest
from embedding_store.served import Remainder, ServedLookup
from embedding_store.sidecar_stats import SidecarStats, info_sections, info_text

Reply = bytes | memoryview  # what a transport writes as it is
Arguments = list[bytearray]  # after the command's name

_log = logging.getLogger(__name__)


class CommandError(Exception):
    """Becomes the error reply `-CODE message`."""

    def __init__(self, message: str, code: str = "ERR") -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Session:
    """What one connection has said about itself."""

    id: int
    authenticated: bool
    version: int = 2  # of RESP
    name: bytes = b""
    quit: bool = False


class Commands:
    def __init__(
        self,
        store: ServedLookup,
        *,
        threads: ThreadPoolExecutor,
        max_frame: int,
        password: bytes | None,
        server: Mapping[str, object],
    ) -> None:
        """server: what INFO and HELLO say about this process; `version` is one of its keys."""
        self.stats = SidecarStats()
        self._store = store
        self._threads = threads
        self._max_frame = max_frame
        self._password = password
        self._server = server
        self._manifests: dict[str, ReleaseManifest] = {}  # a release never changes, so neither do these
        self._row_bytes: dict[str, dict[str, int]] = {}
        self._warmed: dict[str, int] = {}
        # name -> (method, fewest arguments, most arguments), the name itself not counted
        self._table: dict[bytes, tuple[Callable[[Session, Arguments], Reply | asyncio.Future[Reply]], int, int]] = {
            b"TR.LOOKUP": (self._lookup, 1, 1),
            b"TR.INFO": (self._release_info, 0, 1),
            b"TR.RELEASES": (self._releases, 0, 0),
            b"PING": (self._ping, 0, 1),
            b"HELLO": (self._hello, 0, 6),
            b"AUTH": (self._auth, 1, 2),
            b"INFO": (self._info, 0, 1),
            b"CLIENT": (self._client, 1, 4),
            b"COMMAND": (self._command, 0, 32),
            b"QUIT": (self._quit, 0, 0),
        }

    def warm(self, release: str) -> int:
        """Loads the hot rows of `release`; returns how many. May wait for a network."""
        manifest = self._remember(self._store.manifest(release))
        self._warmed[release] = self._store.warm(release)
        # One look-up, so that kernels are compiled and files mapped before the first client waits for it.
        some = np.array([0, -1], np.int64)
        self._store.lookup(release, {table.name: some for table in manifest.tables})
        return self._warmed[release]

    def _remember(self, manifest: ReleaseManifest) -> ReleaseManifest:
        self._row_bytes[manifest.name] = {table.name: table.row_bytes for table in manifest.tables}
        self._manifests[manifest.name] = manifest
        return manifest

    def session(self) -> Session:
        self.stats.connections_total += 1
        return Session(self.stats.connections_total, self._password is None)

    def answer(self, session: Session, command: Arguments) -> Reply | asyncio.Future[Reply]:
        """Never raises, and neither does the future: what goes wrong becomes an error reply."""
        self.stats.commands += 1
        name = bytes(command[0]).upper()
        try:
            method, fewest, most = self._table[name]
            if not session.authenticated and name not in (b"AUTH", b"HELLO", b"QUIT"):
                raise CommandError("Authentication required.", "NOAUTH")
            if not fewest <= len(command) - 1 <= most:
                raise CommandError(f"wrong number of arguments for '{_shown(command[0])}'")
            return method(session, command[1:])
        except KeyError:
            known = ", ".join(known.decode() for known in self._table)
            return self._failed(CommandError(f"unknown command '{_shown(command[0])}'; known are: {known}"))
        except Exception as error:  # noqa: BLE001  # _failed logs what nobody expected; one bad request ends no other's
            return self._failed(error)

    def _failed(self, error: BaseException) -> bytes:
        self.stats.errors += 1
        if isinstance(error, CommandError):
            return resp.error(error.code, str(error))
        if isinstance(error, StoreError):
            return resp.error(error_code(error), str(error))
        _log.error("internal error", exc_info=error)
        return resp.error("ERR", f"internal error: {type(error).__name__}")

    def _in_thread(self, work: Callable[[], Reply]) -> asyncio.Future[Reply]:
        def guarded() -> Reply | BaseException:
            try:
                return work()
            except Exception as error:  # noqa: BLE001  # handed to _failed, in the event loop
                return error

        async def run() -> Reply:
            result = await asyncio.get_running_loop().run_in_executor(self._threads, guarded)
            return self._failed(result) if isinstance(result, BaseException) else result

        return asyncio.ensure_future(run())

    # ---- look-ups

    def _lookup(self, session: Session, arguments: Arguments) -> Reply | asyncio.Future[Reply]:
        began = time.perf_counter()
        request = decode_request(arguments[0])
        manifest = self._manifests.get(request.release)
        if manifest is not None:
            self._check_size(request, manifest)
            found = self._store.begin(request.release, request.ids)
            if isinstance(found, LookupReply):
                return self._counted(found, began)
        else:
            found = functools.partial(self._from_the_start, request)
        self.stats.offloaded += 1
        return asyncio.ensure_future(self._in_a_thread(request, found, began))

    def _from_the_start(self, request: LookupRequest, timeout: float | None) -> LookupReply:
        """The first look-up of a release: its manifest has to be read too."""
        self._check_size(request, self._remember(self._store.manifest(request.release)))
        return self._store.lookup(request.release, request.ids, timeout=timeout)

    async def _in_a_thread(self, request: LookupRequest, remainder: Remainder, began: float) -> Reply:
        def wait() -> LookupReply | BaseException:
            try:
                return remainder(_left(request, began))
            except Exception as error:  # noqa: BLE001  # handed to _failed, in the event loop
                return error

        found = await asyncio.get_running_loop().run_in_executor(self._threads, wait)
        return self._failed(found) if isinstance(found, BaseException) else self._counted(found, began)

    def _check_size(self, request: LookupRequest, manifest: ReleaseManifest) -> None:
        widths = self._row_bytes[manifest.name]
        if not request.ids.keys() <= widths.keys():
            for table in request.ids:
                manifest.table(table)  # raises UnknownTable for one of them
        shapes = [(len(ids), widths[table]) for table, ids in request.ids.items()]
        size = reply_bytes(request.release, shapes)
        if size > self._max_frame:
            raise ProtocolError(f"the reply would have {size} bytes; at most {self._max_frame} are sent in one frame")

    def _counted(self, found: LookupReply, began: float) -> Reply:
        shapes = [(len(table.index), table.rows.shape[1]) for table in found.tables.values()]
        whole, payload = resp.bulk_buffer(reply_bytes(found.release, shapes))
        write_reply(found, payload)
        asked = sum(count for count, _ in shapes)
        status = status_of(payload, asked).tobytes()
        stats = self.stats
        stats.lookups += 1
        stats.ids += asked
        stats.absent += status.count(ABSENT)
        stats.unavailable += status.count(UNAVAILABLE)
        stats.latency.record(time.perf_counter() - began)
        return whole

    # ---- releases

    def _release_info(self, session: Session, arguments: Arguments) -> asyncio.Future[Reply]:
        """`TR.INFO MODEL@VERSION`, `TR.INFO MODEL` for its active release, `TR.INFO` where only one model is served."""
        name = _text(arguments[0]) if arguments else None

        def work() -> Reply:
            if name is not None and "@" in name:
                manifest = self._store.manifest(name)
            else:
                manifest = self._store.manifest(model=name)
            self._remember(manifest)
            return resp.bulk(msgspec.json.format(msgspec.json.encode(manifest), indent=1))

        return self._in_thread(work)

    def _releases(self, session: Session, arguments: Arguments) -> asyncio.Future[Reply]:
        def work() -> Reply:
            return resp.bulk(msgspec.json.format(msgspec.json.encode(self._store.releases()), indent=1))

        return self._in_thread(work)

    # ---- what clients of Redis ask before they start

    def _ping(self, session: Session, arguments: Arguments) -> Reply:
        return resp.bulk(bytes(arguments[0])) if arguments else resp.simple("PONG")

    def _hello(self, session: Session, arguments: Arguments) -> Reply:
        """HELLO [2|3 [AUTH user password] [SETNAME name]]"""
        version, name = session.version, session.name
        if arguments:
            if bytes(arguments[0]) not in (b"2", b"3"):
                raise CommandError("unsupported protocol version; 2 and 3 are spoken here", "NOPROTO")
            version = int(arguments[0])
        options = arguments[1:]
        while options:
            option = bytes(options[0]).upper()
            if option == b"AUTH" and len(options) >= 3:
                self._check_password(session, options[2])
                options = options[3:]
            elif option == b"SETNAME" and len(options) >= 2:
                name = bytes(options[1])
                options = options[2:]
            else:
                raise CommandError(f"syntax error in HELLO option '{_shown(options[0])}'")
        if not session.authenticated:
            raise CommandError("HELLO must be called with the client already authenticated, or with AUTH", "NOAUTH")
        session.version, session.name = version, name
        about = {
            "server": resp.bulk(b"torchrank-sidecar"),
            "version": resp.bulk(str(self._server["version"]).encode()),
            "proto": resp.integer(version),
            "id": resp.integer(session.id),
            "mode": resp.bulk(b"standalone"),
            "role": resp.bulk(b"master"),
            "modules": resp.array(()),
        }
        return resp.mapping(about, version)

    def _auth(self, session: Session, arguments: Arguments) -> Reply:
        self._check_password(session, arguments[-1])
        return resp.OK

    def _check_password(self, session: Session, given: bytearray) -> None:
        if self._password is None:
            raise CommandError("AUTH was sent, but this sidecar has no password")
        if not hmac.compare_digest(given, self._password):
            raise CommandError("invalid password", "WRONGPASS")
        session.authenticated = True

    def _info(self, session: Session, arguments: Arguments) -> Reply:
        releases = {
            name: f"tables={len(manifest.tables)},rows={sum(table.rows for table in manifest.tables)},"
            f"bytes={sum(table.bytes for table in manifest.tables)},warmed_rows={self._warmed.get(name, 0)}"
            for name, manifest in sorted(self._manifests.items())
        }
        sections = info_sections(self.stats, self._store.stats(), self._server, releases)
        return resp.bulk(info_text(sections, _text(arguments[0]).lower() if arguments else None).encode())

    def _client(self, session: Session, arguments: Arguments) -> Reply:
        """What redis-cli and redis-py send when they connect: SETINFO, SETNAME, ID, GETNAME."""
        action = bytes(arguments[0]).upper()
        if action == b"SETINFO" and len(arguments) == 3:
            return resp.OK
        if action == b"SETNAME" and len(arguments) == 2:
            session.name = bytes(arguments[1])
            return resp.OK
        if action == b"GETNAME" and len(arguments) == 1:
            return resp.bulk(session.name)
        if action == b"ID" and len(arguments) == 1:
            return resp.integer(session.id)
        raise CommandError(f"unknown subcommand or wrong number of arguments for 'CLIENT {_shown(arguments[0])}'")

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

    def _quit(self, session: Session, arguments: Arguments) -> Reply:
        session.quit = True
        return resp.OK


def _left(request: LookupRequest, began: float) -> float | None:
    """Seconds of the request's own time that are left, after it waited for a thread."""
    if request.timeout is None:
        return None
    left = request.timeout - (time.perf_counter() - began)
    if left <= 0:
        raise StoreUnavailable(f"the request's {request.timeout:g} s were over before a thread could take it")
    return left


def _text(argument: bytearray) -> str:
    try:
        return argument.decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"{_shown(argument)} is not UTF-8") from error


def _shown(argument: bytearray) -> str:
    """An argument as it may stand in an error reply: short, printable."""
    return argument[:64].decode("ascii", "backslashreplace").encode("unicode_escape").decode()
