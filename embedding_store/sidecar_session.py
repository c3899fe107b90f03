"""What one connection has said about itself, and how a command of it fails."""

from __future__ import annotations

from dataclasses import dataclass

Reply = bytes | bytearray  # what a transport writes as it is
Arguments = list[bytearray]  # after the command's name


class CommandError(Exception):
    """Becomes the error reply `-CODE message`."""

    def __init__(self, message: str, code: str = "ERR") -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class Session:
    id: int
    authenticated: bool
    version: int = 2  # of RESP
    name: bytes = b""
    quit: bool = False


def text_of(argument: bytearray) -> str:
    try:
        return argument.decode()
    except UnicodeDecodeError as error:
        raise CommandError(f"{shown(argument)} is not UTF-8") from error


def shown(argument: bytearray) -> str:
    """An argument as it may stand in an error reply: short, printable."""
    return argument[:64].decode("ascii", "backslashreplace").encode("unicode_escape").decode()
