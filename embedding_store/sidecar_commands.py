"""The commands of the sidecar: arguments in, an encoded reply out. Nothing here knows sockets.

What is answered from memory is answered at once, in the event loop. What may wait for a store goes to a thread and
comes back as a future, so that one slow fetch holds up no other connection.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from embedding_store import resp
from embedding_store.errors import StoreError
from embedding_store.protocol import error_code
from embedding_store.served import ServedLookup
from embedding_store.sidecar_lookup import Lookups
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
        self.lookups = Lookups(store, threads, max_frame, self.stats)
        self._store = store
        self._threads = threads
        self._password = password
        self._server = server
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

    def session(self) -> Session:
        self.stats.connections_total += 1
        return Session(self.stats.connections_total, self._password is None)

    def answer(self, session: Session, command: Arguments) -> Reply | asyncio.Future[Reply]:
        """Never raises, and neither does the future: what goes wrong becomes an error reply."""
        self.stats.commands += 1
        name = bytes(command[0]).upper()
        try:
            if name not in self._table:
                known = ", ".join(known.decode() for known in self._table)
                raise CommandError(f"unknown command '{_shown(command[0])}'; known are: {known}")
            method, fewest, most = self._table[name]
            if not session.authenticated and name not in (b"AUTH", b"HELLO", b"QUIT"):
                raise CommandError("Authentication required.", "NOAUTH")
            if not fewest <= len(command) - 1 <= most:
                raise CommandError(f"wrong number of arguments for '{_shown(command[0])}'")
            return method(session, command[1:])
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

    async def _guarded(self, work: Awaitable[Reply]) -> Reply:
        try:
            return await work
        except Exception as error:  # noqa: BLE001  # _failed logs what nobody expected
            return self._failed(error)

    def _in_thread(self, work: Callable[[], Reply]) -> asyncio.Future[Reply]:
        return asyncio.ensure_future(self._guarded(asyncio.get_running_loop().run_in_executor(self._threads, work)))

    # ---- look-ups and releases

    def _lookup(self, session: Session, arguments: Arguments) -> Reply | asyncio.Future[Reply]:
        found = self.lookups.answer(arguments[0])
        return found if isinstance(found, memoryview) else asyncio.ensure_future(self._guarded(found))

    def _release_info(self, session: Session, arguments: Arguments) -> asyncio.Future[Reply]:
        """`TR.INFO MODEL@VERSION`, `TR.INFO MODEL` for its active release, `TR.INFO` where only one model is served."""
        name = _text(arguments[0]) if arguments else None

        def work() -> Reply:
            if name is not None and "@" in name:
                manifest = self._store.manifest(name)
            else:
                manifest = self._store.manifest(model=name)
            self.lookups.remember(manifest)
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
        sections = info_sections(self.stats, self._store.stats(), self._server, self.lookups.releases())
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


def _text(argument: bytearray) -> str:
    try:
        return argument.decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"{_shown(argument)} is not UTF-8") from error


def _shown(argument: bytearray) -> str:
    """An argument as it may stand in an error reply: short, printable."""
    return argument[:64].decode("ascii", "backslashreplace").encode("unicode_escape").decode()
