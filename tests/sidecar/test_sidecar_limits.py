"""What a sidecar grants its peers: connections, silence, and no more."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest

from embedding_store import resp
from embedding_store.client import SidecarClient
from embedding_store.errors import StoreUnavailable
from embedding_store.protocol import encode_request
from tests.sidecar.raw_socket import connect, read_all
from tests.sidecar.test_sidecar_client import check, until

PING, PONG = resp.command(b"PING"), b"+PONG\r\n"


def test_connections_beyond_the_limit_are_told_and_closed(start, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--max-connections", "5")
    with ExitStack() as opened:
        held = [opened.enter_context(connect(process.socket)) for _ in range(5)]
        for raw in held:
            raw.sendall(PING)
            assert raw.recv(100) == PONG
        for _ in range(3):
            with connect(process.socket) as raw:
                assert read_all(raw) == b"-ERR max number of clients reached\r\n"
        client = process.client()
        with pytest.raises(StoreUnavailable, match=r"s\.sock: max number of clients reached"):
            client.ping()
        for raw in held:  # those that were in are not concerned
            raw.sendall(PING)
            assert raw.recv(100) == PONG
        held[0].close()
        until(lambda: _answers(client), "a connection that closed makes room")
        check(client, release, {"item": np.arange(10)})
        info = client.info()
    assert int(info["rejected_connections"]) >= 4
    assert int(info["connected_clients"]) == int(info["maxclients"]) == 5


def _answers(client: SidecarClient) -> bool:
    try:
        client.ping()
    except StoreUnavailable:
        return False
    return True


def test_a_connection_that_says_nothing_is_closed(start, release) -> None:  # type: ignore[no-untyped-def]
    """A silent one, one that stopped inside a frame, and one that pinged; not one that goes on pinging."""
    process = start("--idle-timeout", "0.6")
    client = process.client()
    with connect(process.socket) as silent, connect(process.socket) as halfway, connect(process.socket) as lively:
        client.ping()
        halfway.sendall(resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": np.arange(9)}))[:-5])
        for _ in range(20):
            lively.sendall(PING)
            assert lively.recv(100) == PONG
            time.sleep(0.1)
        assert read_all(silent) == read_all(halfway) == b""
        lively.sendall(PING)
        assert lively.recv(100) == PONG
    check(client, release, {"item": np.arange(10)})  # its kept socket was closed too: it opens another
    assert int(client.info()["idle_closed_clients"]) >= 3


def test_slow_frames_and_unread_replies_are_not_idleness(start, release) -> None:  # type: ignore[no-untyped-def]
    """A frame that comes in drops for longer than the time-out, and 1 MB of replies that are read after it."""
    process = start("--idle-timeout", "0.5")
    ids = np.arange(5000)
    frame = resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": ids}))
    reply_bytes = len(b"$165032\r\n\r\n") + 165032
    with connect(process.socket) as slow, connect(process.socket) as late:
        late.sendall(frame * 6)
        for start_of_piece in range(0, len(frame), len(frame) // 8):
            slow.sendall(frame[start_of_piece : start_of_piece + len(frame) // 8])
            time.sleep(0.2)
        for raw, replies in ((slow, 1), (late, 6)):
            received = bytearray()
            while len(received) < replies * reply_bytes:
                piece = raw.recv(1 << 20)
                assert piece, f"closed after {len(received):,} of {replies * reply_bytes:,} bytes"
                received += piece
            rows = np.frombuffer(received, np.float16, 5000 * 16, len(received) - reply_bytes + 9 + 32)
            np.testing.assert_array_equal(rows.reshape(5000, 16), release.tables["item"])


def test_a_look_up_that_waits_for_its_store_is_not_idle(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--idle-timeout", "0.4", url=redis_store.url)
    cold = np.setdiff1d(np.arange(5000), release.hot["item"])[:50]
    with connect(process.socket) as raw:
        redis_store.pause()
        try:
            raw.sendall(resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": cold})))
            time.sleep(1.5)
        finally:
            redis_store.resume()
        assert raw.recv(100).startswith(b"$1688\r\n")  # 16 + 8 + 8 + 50 x 32 + 56


def test_no_time_out_where_none_is_wanted(start) -> None:  # type: ignore[no-untyped-def]
    process = start("--idle-timeout", "0")
    with connect(process.socket) as raw:
        raw.sendall(PING)
        assert raw.recv(100) == PONG
        time.sleep(1.0)
        raw.sendall(PING)
        assert raw.recv(100) == PONG


def test_who_has_not_shown_the_password_gets_small_frames_only(start, release) -> None:  # type: ignore[no-untyped-def]
    process = start(environment={"TORCHRANK_SIDECAR_PASSWORD": "correct horse"})
    large = resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": np.arange(5000)}))
    with connect(process.socket) as raw:
        raw.sendall(resp.command(b"AUTH", bytes(16_000)) + b"*2\r\n$4\r\nAUTH\r\n$16384\r\n")
        wrong, large_frame = read_all(raw).splitlines()
        assert wrong == b"-WRONGPASS invalid password"
        assert large_frame == b"-PROTOCOL a frame of 16408 bytes or more; at most 16384 are accepted before AUTH"
    with connect(process.socket) as raw:
        raw.sendall(resp.command(b"AUTH", b"correct horse") + large)
        assert (raw.recv(5), raw.recv(9)) == (b"+OK\r\n", b"$165032\r\n")
    check(process.client(password="correct horse"), release, {"item": np.arange(5000)})


def test_commands_that_wait_for_their_turn_are_not_heaped_up(start) -> None:  # type: ignore[no-untyped-def]
    """A peer that sends small commands faster than they are answered, and reads its replies, is slowed down."""
    process = start()
    piece, pieces, answered = PING * 2000, 300, 0

    def read(raw: socket.socket) -> None:
        nonlocal answered
        while answered < pieces * 2000 * len(PONG) and (chunk := raw.recv(1 << 20)):
            answered += len(chunk)

    with connect(process.socket) as raw:
        reader = threading.Thread(target=read, args=(raw,))
        reader.start()
        most = 0
        for sent in range(1, pieces + 1):
            raw.sendall(piece)
            most = max(most, sent * len(piece) - answered // len(PONG) * len(PING))
        reader.join()
    assert answered == pieces * 2000 * len(PONG)
    assert most < 4 << 20, f"{most:,} bytes of commands were taken and not answered yet"
