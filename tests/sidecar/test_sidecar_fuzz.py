"""More than 10^5 random and mutated frames for a real sidecar, and as many for its parser alone: no crash, no hang, no
growth."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import hiredis
import numpy as np
import pytest

from embedding_store import resp
from embedding_store.errors import ProtocolError
from embedding_store.protocol import decode_request, encode_request, request_names
from tests.sidecar.conftest import Process
from tests.sidecar.raw_socket import connect
from tests.sidecar.test_sidecar_client import check, until

SEED = 977
BATCH = 250  # commands of one send: their replies fit the buffers on the way back
MOST_GROWTH = 24 << 20  # bytes; an allocator's arenas, not a leak that 10^5 frames would show

GOOD = encode_request("feed@v1", {"item": np.arange(5), "user": np.arange(-1, 2)}, 0.5)
# From numbers at their limits to bytes that mean something in either format.
SPLINTERS = (
    b"\0", b"\xff", b"\x80", b"\x7f", b"\0" * 8, b"\xff" * 4, b"\r\n", b"*", b"$", b"-1", b"*3\r\n", b"$0\r\n\r\n",
    b"$4294967295\r\n", b"TRQ1", b"feed@v1", b"item", b"9" * 40,
)  # fmt: skip
NAMES = (
    b"TR.LOOKUP", b"TR.INFO", b"TR.RELEASES", b"TR.READY", b"INFO", b"COMMAND", b"PING", b"HELLO", b"AUTH", b"CLIENT",
    b"GET", b"SHUTDOWN", b"CONFIG", b"MULTI", b"SUBSCRIBE", b"",
)  # fmt: skip


def mutated(rng: random.Random, good: bytes) -> bytes:
    frame = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        place = rng.randint(0, len(frame))
        action = rng.randrange(5)
        if action == 0 and place < len(frame):
            frame[place] = rng.randrange(256)
        elif action == 1:
            frame[place:place] = rng.choice(SPLINTERS)
        elif action == 2:
            splinter = rng.choice(SPLINTERS)
            frame[place : place + len(splinter)] = splinter
        elif action == 3:
            del frame[place : place + rng.randint(1, 16)]
        elif place:
            del frame[rng.randrange(place) :]
    return bytes(frame)


def command(rng: random.Random) -> bytes:
    """Good RESP with anything in it: mostly look-ups gone wrong."""
    if rng.random() < 0.8:
        return resp.command(b"TR.LOOKUP", mutated(rng, GOOD))
    arguments = [mutated(rng, rng.choice(SPLINTERS + NAMES)) for _ in range(rng.randint(0, 5))]
    return resp.command(rng.choice(NAMES), *arguments)


def replies(raw: socket.socket, wanted: int) -> Iterator[object]:
    """Read by hiredis. Fewer than `wanted` where the connection ends before."""
    reader = hiredis.Reader()
    while wanted:
        reply = reader.gets()
        if reply is not False:
            wanted -= 1
            yield reply
            continue
        piece = raw.recv(1 << 18)
        if not piece:
            return
        reader.feed(piece)


def resident(process: Process) -> int:
    """Bytes of its own: pages of mapped tables are not counted."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def test_parser_and_decoder() -> None:
    """In process, 60,000 mutations of frames and 60,000 of streams: nothing but ProtocolError comes out."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    decoded = refused = commands = 0
    for _ in range(60_000):
        try:
            request = decode_request(bytearray(mutated(rng, GOOD)))
            request_names(request)
            decoded += 1
            assert request.ids.nbytes <= 2 * len(GOOD)
        except ProtocolError:
            refused += 1
    stream = resp.command(b"TR.LOOKUP", GOOD) + resp.command(b"PING", b"x" * 40)
    for _ in range(60_000):
        parser = resp.CommandParser(4096)
        try:
            parser.feed(mutated(rng, stream))
            while parser.next() is not None:
                commands += 1
        except ProtocolError:
            refused += 1
    assert min(decoded, commands) > 1000
    assert refused > 50_000


def test_commands_gone_wrong(start, release) -> None:  # type: ignore[no-untyped-def]
    """100,000 commands that are good RESP: each gets one reply, on connections that stay open until they say QUIT."""
    print(f"seed {SEED + 1}")
    rng = random.Random(SEED + 1)
    process = start()
    before, answered, errors = 0, 0, 0
    for round_number in range(40):
        with connect(process.socket) as raw:
            for _ in range(10):
                raw.sendall(b"".join(command(rng) for _ in range(BATCH)))
                found = list(replies(raw, BATCH))
                assert len(found) == BATCH
                answered += len(found)
                errors += sum(isinstance(reply, hiredis.ReplyError) for reply in found)
                assert not any("internal error" in str(reply) for reply in found)
        if round_number == 3:
            before = resident(process)  # arenas, plans and the like have their size by now
    assert answered == 100_000
    assert 40_000 < errors < answered
    assert resident(process) - before < MOST_GROWTH
    check(process.client(), release, release.random_ids(np.random.default_rng(0), 200))
    code, log = process.stop()
    assert code == 0
    assert "internal error" not in log


def test_streams_gone_wrong(start, release) -> None:  # type: ignore[no-untyped-def]
    """27,000 frames and more, whose RESP itself is broken sooner or later, on 3,000 connections; some peers just go."""
    print(f"seed {SEED + 2}")
    rng = random.Random(SEED + 2)
    process = start("--max-frame", "64KiB", "--max-connections", "5000")  # refused ones linger for a second
    before = 0
    for number in range(3000):
        stream = b"".join(command(rng) for _ in range(9))
        kind = rng.randrange(3)
        if kind == 0:
            stream += rng.randbytes(rng.randint(1, 300))
        else:
            stream = mutated(rng, stream + resp.command(b"TR.LOOKUP", GOOD))
        with closing(connect(process.socket)) as raw:
            try:
                raw.sendall(stream)
                if kind != 2:
                    raw.shutdown(socket.SHUT_WR)
                    for reply in replies(raw, 1 << 20):
                        assert "internal error" not in str(reply), f"connection {number}"
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all of it was sent
        if number == 500:
            before = resident(process)
    assert resident(process) - before < MOST_GROWTH
    client = process.client()
    check(client, release, release.random_ids(np.random.default_rng(0), 200))
    info = client.info()
    assert info["rejected_connections"] == "0"
    assert int(info["total_commands_processed"]) > 10_000
    until(lambda: client.info()["connected_clients"] == "1", "all others are gone")
    code, log = process.stop()
    assert code == 0
    assert "internal error" not in log


def pour(raw: socket.socket, piece: bytes) -> None:
    for _ in range(100_000):
        raw.sendall(piece)


@pytest.mark.parametrize("garbage", [b"\0", b"\xff", b"*", b"$", b"\r", b"\n", b"1", b"-"])
def test_endless_garbage_is_cut_off(sidecar, garbage: bytes) -> None:  # type: ignore[no-untyped-def]
    """A peer that never stops: it gets its error, then its end."""
    before = resident(sidecar)
    with connect(sidecar.socket) as raw, pytest.raises((BrokenPipeError, ConnectionResetError)):
        pour(raw, garbage * (1 << 16))
    assert resident(sidecar) - before < MOST_GROWTH
    sidecar.client().ping()
