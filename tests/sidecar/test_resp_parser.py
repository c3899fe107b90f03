"""CommandParser: any cut of a stream gives the same commands, and no declared length costs memory."""

from __future__ import annotations

import random

import pytest

from embedding_store import resp
from embedding_store.errors import ProtocolError

LIMIT = 10_000


def parse(pieces: list[bytes]) -> list[list[bytes]]:
    parser = resp.CommandParser(LIMIT)
    commands = []
    for piece in pieces:
        parser.feed(piece)
        while (command := parser.next()) is not None:
            commands.append([bytes(argument) for argument in command])
    assert not parser.inside_command
    return commands


def test_any_cut_of_a_stream_gives_the_same_commands() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        commands = [
            [rng.randbytes(rng.choice((0, 1, 7, 300))) for _ in range(rng.randint(1, 4))]
            for _ in range(rng.randint(1, 6))
        ]
        stream = b"".join(resp.command(*command) for command in commands)
        cuts = sorted(rng.randint(0, len(stream)) for _ in range(rng.randint(0, 12)))
        pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        assert parse([piece for piece in pieces if piece]) == commands, f"seed {seed}"
        assert parse([bytes([byte]) for byte in stream]) == commands, f"seed {seed}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PING\r\n", r"expected '\*', found b'P'"),
        (b"GET / HTTP/1.1\r\n", r"expected '\*'"),
        (b"*0\r\n", "a command of 0 arguments; 1 to 64 are accepted"),
        (b"*-1\r\n", "is no length"),
        (b"*1000000000\r\n", "a command of 1000000000 arguments"),
        (b"*1_0\r\n", "is no length"),
        (b"* 1\r\n", "is no length"),
        (b"*\r\n", "is no length"),
        (b"*" + b"1" * 40, "is no length"),
        (b"*1\r\n*1\r\n", r"expected '\$', found b'\*'"),
        (b"*1\r\n$-1\r\n", "is no length"),
        (b"*1\r\n$4\r\nPINGxx", "an argument of 4 bytes is followed by b'xx'"),
        (b"*1\r\n$9990\r\n", "a frame of 10003 bytes or more; at most 10000"),
        (b"*1\r\n$99999999999999999999\r\n", "at most 10000 are accepted"),
        (b"*2\r\n$6000\r\n" + bytes(6000) + b"\r\n$6000\r\n", "at most 10000 are accepted"),
    ],
)
def test_what_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse([data])
    with pytest.raises(ProtocolError, match=message):
        parse([bytes([byte]) for byte in data])


def test_a_frame_of_exactly_the_limit_passes() -> None:
    overhead = len(resp.command(bytes(9000))) - 9000
    assert parse([resp.command(bytes(LIMIT - overhead))]) == [[bytes(LIMIT - overhead)]]
    with pytest.raises(ProtocolError, match="at most 10000"):
        parse([resp.command(bytes(LIMIT - overhead + 1))])


def test_replies() -> None:
    assert resp.error("ERR", "two\r\nlines\n-FAKE") == b"-ERR two lines -FAKE\r\n"
    assert resp.mapping({"a": resp.integer(1)}, 3) == b"%1\r\n$1\r\na\r\n:1\r\n"
    assert resp.mapping({"a": resp.integer(1)}, 2) == b"*2\r\n$1\r\na\r\n:1\r\n"
    whole, start = resp.bulk_buffer(3)
    assert whole == resp.bulk(bytes(3))
    whole[start : start + 3] = b"abc"
    assert whole == resp.bulk(b"abc") == b"$3\r\nabc\r\n"
