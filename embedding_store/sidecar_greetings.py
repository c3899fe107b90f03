"""What clients of Redis ask before they start: PING, HELLO, AUTH, CLIENT, QUIT."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from embedding_store import resp
from embedding_store.sidecar_session import Arguments, CommandError, Reply, Session, shown


class Greetings:
    def __init__(self, password: bytes | None, server: Mapping[str, object]) -> None:
        """server: what HELLO says about this process; `version` is one of its keys."""
        self._password = password
        self._server = server

    @property
    def open_to_all(self) -> bool:
        return self._password is None

    def ping(self, session: Session, arguments: Arguments) -> Reply:
        return resp.bulk(bytes(arguments[0])) if arguments else resp.simple("PONG")

    def hello(self, session: Session, arguments: Arguments) -> Reply:
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
                raise CommandError(f"syntax error in HELLO option '{shown(options[0])}'")
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

    def auth(self, session: Session, arguments: Arguments) -> Reply:
        self._check_password(session, arguments[-1])
        return resp.OK

    def _check_password(self, session: Session, given: bytearray) -> None:
        if self._password is None:
            raise CommandError("AUTH was sent, but this sidecar has no password")
        if not hmac.compare_digest(given, self._password):
            raise CommandError("invalid password", "WRONGPASS")
        session.authenticated = True

    def client(self, session: Session, arguments: Arguments) -> Reply:
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
        raise CommandError(f"unknown subcommand or wrong number of arguments for 'CLIENT {shown(arguments[0])}'")

    def quit(self, session: Session, arguments: Arguments) -> Reply:
        session.quit = True
        return resp.OK
