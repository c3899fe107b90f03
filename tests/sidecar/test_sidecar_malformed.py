"""What strangers send: garbage, lies about lengths, and mutations of good frames."""

from __future__ import annotations

import random
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from embedding_store import resp
from embedding_store.errors import ProtocolError
from embedding_store.protocol import decode_request, encode_request, request_names
from tests.sidecar.raw_socket import connect, read_all


def resident(process) -> int:  # type: ignore[no-untyped-def]
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PING\r\n", b"-PROTOCOL expected '*', found b'P'"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"-PROTOCOL expected '*'"),
        (b"*1\r\n$4\r\nPINGPONG", b"-PROTOCOL an argument of 4 bytes"),
        (
            b"*2\r\n$9\r\nTR.LOOKUP\r\n$999999999\r\n",
            b"-PROTOCOL a frame of 1000000032 bytes or more; at most 16777216",
        ),
        (b"*4294967295\r\n", b"-PROTOCOL a command of 4294967295 arguments"),
        (bytes(range(256)) * 10, b"-PROTOCOL"),
    ],
)
def test_what_is_no_command_gets_an_error_and_the_connection_closes(sidecar, data, message) -> None:  # type: ignore[no-untyped-def]
    before = resident(sidecar)
    with connect(sidecar.socket) as raw:
        raw.sendall(resp.command(b"PING") + data)
        received = read_all(raw)
        assert received.startswith(b"+PONG\r\n" + message), received
        assert received.count(b"\r\n") == 2
    assert resident(sidecar) - before < 32 << 20
    sidecar.client().ping()


def test_an_oversized_frame_that_is_really_sent_gets_its_error(sidecar) -> None:  # type: ignore[no-untyped-def]
    with connect(sidecar.socket) as raw:
        raw.sendall(
            resp.command(b"TR.LOOKUP", bytes(20 << 20))
        )  # the sidecar refuses, and reads on for the error's sake
        assert read_all(raw).startswith(b"-PROTOCOL a frame of 20971")
    with pytest.raises(ProtocolError, match="at most 16777216 are accepted"):
        sidecar.client().lookup("feed@v1", {"category": np.arange(3 << 20)})


def test_frame_limit_is_an_option(start) -> None:  # type: ignore[no-untyped-def]
    process = start("--max-frame", "4KiB")
    client = process.client()
    client.lookup("feed@v1", {"category": np.arange(400)})
    with pytest.raises(ProtocolError, match="the reply would have"):
        client.lookup("feed@v1", {"item": np.arange(400)})
    with pytest.raises(ProtocolError, match=r"a frame of .* at most 4096 are accepted"):
        client.lookup("feed@v1", {"category": np.arange(600)})
    client.ping()


def mutate(rng: random.Random, good: bytes) -> bytes:
    frame = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        action = rng.random()
        place = rng.randrange(len(frame)) if frame else 0
        if action < 0.5 and frame:
            frame[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action < 0.7:
            del frame[place : place + rng.randint(1, 16)]
        elif action < 0.85:
            frame[place:place] = rng.randbytes(rng.randint(1, 16))
        else:
            del frame[place:]
    return bytes(frame)


def test_mutated_frames_are_decoded_or_refused() -> None:
    """In process, 20,000 of them: nothing but ProtocolError comes out, and what passes is inside the frame."""
    good = encode_request("feed@v1", {"item": np.arange(5), "größe": np.arange(2)}, 0.5)
    passed = refused = 0
    for seed in range(20_000):
        frame = bytearray(mutate(random.Random(seed), good))
        try:
            request = decode_request(frame)
            request_names(request)
        except ProtocolError:
            refused += 1
        else:
            passed += 1
            assert request.ids.nbytes <= len(frame), f"seed {seed}"
    assert passed > 100
    assert refused > 10_000


def test_a_sidecar_survives_mutated_frames(sidecar) -> None:  # type: ignore[no-untyped-def]
    """3,000 mutations of look-up frames, intact as RESP: one reply each, on connections that stay open."""
    good = encode_request("feed@v1", {"item": np.arange(5), "user": np.arange(2)}, 0.5)
    began = time.monotonic()
    with connect(sidecar.socket) as raw:
        replies = raw.makefile("rb")
        for seed in range(3000):
            raw.sendall(resp.command(b"TR.LOOKUP", mutate(random.Random(seed), good)))
            line = replies.readline()
            assert line[:1] in (b"$", b"-"), f"seed {seed}: {line!r}"
            assert not line.startswith(b"-ERR"), f"seed {seed}: {line!r}"
            if line[:1] == b"$":
                replies.read(int(line[1:]) + 2)
        replies.close()
    assert time.monotonic() - began < 60


def test_a_sidecar_survives_mutated_streams(sidecar) -> None:  # type: ignore[no-untyped-def]
    """2,000 mutations of RESP itself: each connection gets replies, or an end, within bounded time."""
    good = resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": np.arange(3)})) + resp.command(b"PING")
    began = time.monotonic()
    for seed in range(2000):
        with connect(sidecar.socket) as raw:
            raw.sendall(mutate(random.Random(seed), good))
            raw.shutdown(socket.SHUT_WR)
            received = read_all(raw)
            assert received[:1] in (b"", b"$", b"-", b"+", b"*"), f"seed {seed}: {received[:60]!r}"
            assert b"internal error" not in received, f"seed {seed}: {received!r}"
    assert time.monotonic() - began < 60
    client = sidecar.client()
    client.ping()
    assert int(client.info()["connected_clients"]) < 10
