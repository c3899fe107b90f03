"""Start, drain and stop of real sidecar processes; a slow store behind them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from embedding_store import resp
from embedding_store.errors import StoreUnavailable
from embedding_store.protocol import encode_request
from embedding_store.sidecar_socket import UnixListener, listen_tcp, tcp_address
from tests.sidecar.raw_socket import connect, read_all
from tests.sidecar.test_sidecar_client import until
from torchrank.cli import cli

REQUEST = encode_request("feed@v1", {"category": np.arange(5)})
REPLY_BYTES = len(b"$80\r\n\r\n") + 80  # header 16, directory 8, name 8, rows 5 x 8, status 8


def test_socket_rights_and_the_end_of_the_file(start) -> None:  # type: ignore[no-untyped-def]
    process = start()
    found = process.socket.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o660
    assert "feed@v1; warmed 2,968 rows" in process.ready
    assert process.stop() == (0, "")
    assert not process.socket.exists()
    process = start("--socket-mode", "600")
    assert stat.S_IMODE(process.socket.stat().st_mode) == 0o600
    assert process.stop(signal.SIGINT) == (0, "")


def test_a_socket_that_answers_is_left_alone(start, release) -> None:  # type: ignore[no-untyped-def]
    first = start()
    with pytest.raises(RuntimeError, match=r"Error: .*s\.sock: another process answers there; stop it first"):
        start()
    first.client().ping()
    assert first.stop()[0] == 0


def test_a_stale_socket_is_replaced_and_a_file_is_not(start, socket_folder: Path) -> None:  # type: ignore[no-untyped-def]
    start().stop(signal.SIGKILL)
    assert (socket_folder / "s.sock").exists()
    start().client().ping()
    (socket_folder / "file").write_text("precious")
    with pytest.raises(RuntimeError, match="file exists and is not a socket; it is left as it is"):
        start(socket=socket_folder / "file")
    assert (socket_folder / "file").read_text() == "precious"


def test_only_its_own_socket_file_is_removed(socket_folder: Path) -> None:
    path = socket_folder / "s.sock"
    first = UnixListener(path, 0o600)
    path.unlink()
    second = UnixListener(path, 0o600)
    first.remove()
    assert path.exists()
    second.remove()
    assert not path.exists()
    second.remove()
    for listener in (first, second):
        listener.socket.close()


def test_where_it_cannot_listen(socket_folder: Path) -> None:
    taken = listen_tcp("127.0.0.1", 0)
    address = tcp_address(taken)
    with pytest.raises(StoreUnavailable, match=r"cannot listen on 127\.0\.0\.1:\d+: another process listens there"):
        listen_tcp("127.0.0.1", int(address.rpartition(":")[2]))
    taken.close()
    with pytest.raises(StoreUnavailable, match=r"cannot listen on no\.such\.host\.invalid:1: "):
        listen_tcp("no.such.host.invalid", 1)
    with pytest.raises(StoreUnavailable, match=r"is \d+ bytes long; a socket's path has 107 at most"):
        UnixListener(socket_folder / ("long" * 30), 0o600)
    with pytest.raises(StoreUnavailable, match=r"cannot listen on .*: No such file or directory"):
        UnixListener(socket_folder / "none" / "s.sock", 0o600)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give --socket PATH, --listen HOST:PORT, or both"),
        (("--listen", "nonsense"), 1, "Error: cannot listen on 'nonsense': expected HOST:PORT"),
        (("--socket", "s", "--cache-size", "much"), 1, "Error: size 'much': expected a number and a unit"),
        (("--socket", "s", "--socket-mode", "999"), 2, "--socket-mode 999: expected octal rights"),
        (("--socket", "s", "--max-frame", "10"), 1, "frames of 10 bytes hold no look-up; at least 4096 are taken"),
        (("--socket", "s", "--store", "ftp://x"), 1, "Error: store URL has scheme 'ftp'"),
        (
            ("--socket", "s", "--on-unavailable", "item=zeros"),
            1,
            "'zeros' is unknown; accepted: cache, previous, default",
        ),
        (("--socket", "s", "--password-file", "/none"), 1, "Error: /none: No such file or directory"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...], code: int, message: str) -> None:
    result = CliRunner().invoke(cli, ["sidecar", "--store", "memmap:///none", *arguments])
    assert result.exit_code == code
    assert message in result.output


def test_tcp_for_everybody_without_a_password_is_said(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    message = "may read: no password is set"
    assert message in start("--listen", "0.0.0.0:0").stop()[1]
    assert message not in start("--listen", "127.0.0.1:0").stop()[1]
    (tmp_path / "password").write_text("x")
    assert message not in start("--listen", "0.0.0.0:0", "--password-file", str(tmp_path / "password")).stop()[1]


def test_a_store_that_is_not_there(start, socket_folder: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match=r"^Error: memmap://.*/none cannot be reached: there is no such directory$"):
        start(url=f"memmap://{socket_folder}/none")
    assert not (socket_folder / "s.sock").exists()


def test_sigterm_answers_what_was_sent_before_it(start) -> None:  # type: ignore[no-untyped-def]
    """While the process is stopped, 3 look-ups are sent on each of 40 connections, 20 of them new; then SIGTERM."""
    process = start()
    idle = connect(process.socket)
    idle.sendall(resp.command(b"PING"))
    assert idle.recv(100) == b"+PONG\r\n"
    open_before = [connect(process.socket) for _ in range(20)]
    for raw in open_before:
        raw.sendall(resp.command(b"PING"))
        assert raw.recv(100) == b"+PONG\r\n"
    os.kill(process.process.pid, signal.SIGSTOP)
    in_backlog = [connect(process.socket) for _ in range(20)]
    for raw in open_before + in_backlog:
        raw.sendall(resp.command(b"TR.LOOKUP", REQUEST) * 3)
    os.kill(process.process.pid, signal.SIGTERM)
    os.kill(process.process.pid, signal.SIGCONT)
    for raw in open_before + in_backlog:
        received = read_all(raw)
        assert received.startswith(b"$")
        assert len(received) == 3 * REPLY_BYTES
        raw.close()
    assert read_all(idle) == b""
    idle.close()
    assert process.wait() == (0, "")


def test_sigterm_does_not_wait_for_ever(start) -> None:  # type: ignore[no-untyped-def]
    """Half a frame that never goes on holds the drain up to its limit and no longer."""
    process = start("--drain-seconds", "0.5")
    with connect(process.socket) as raw:
        raw.sendall(resp.command(b"TR.LOOKUP", REQUEST)[:-10])
        time.sleep(0.1)
        began = time.monotonic()
        code, errors = process.stop()
        assert code == 0
        assert 0.4 < time.monotonic() - began < 10
        assert "1 connections were still busy after 0.5 s" in errors


def test_sigterm_waits_for_the_other_half_of_a_frame(start) -> None:  # type: ignore[no-untyped-def]
    process = start()
    frame = resp.command(b"TR.LOOKUP", REQUEST)
    with connect(process.socket) as raw:
        raw.sendall(frame[:40])
        time.sleep(0.1)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        raw.sendall(frame[40:])
        assert len(read_all(raw)) == REPLY_BYTES
    assert process.wait() == (0, "")


def test_a_slow_store_stalls_nobody_else(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    """Redis is paused: look-ups of cold rows wait in threads, hits and PING are answered beside them."""
    process = start(url=redis_store.url)
    client = process.client()
    hot = {"item": release.hot["item"][:50]}
    cold = {"item": np.setdiff1d(np.arange(5000), release.hot["item"])[:50]}
    client.lookup("feed@v1", hot)
    redis_store.pause()
    try:
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(process.client().lookup, "feed@v1", cold) for _ in range(4)]
            time.sleep(0.3)
            for _ in range(50):
                rows = client.lookup("feed@v1", hot, timeout=0.5).tables["item"]
                np.testing.assert_array_equal(
                    rows.rows[rows.index].view(np.float16), release.expected("item", hot["item"])
                )
            assert not any(future.done() for future in waiting)
            redis_store.resume()
            for future in waiting:
                table = future.result(20).tables["item"]
                np.testing.assert_array_equal(
                    table.rows[table.index].view(np.float16), release.expected("item", cold["item"])
                )
    finally:
        redis_store.resume()
    assert int(client.info()["lookups_offloaded"]) >= 4


def test_the_requests_timeout_reaches_the_store(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    """Asked with 0.3 s by a client that itself would wait longer: the sidecar answers that it is the store."""
    process = start(url=redis_store.url)
    cold = np.setdiff1d(np.arange(5000), release.hot["item"])[:50]
    frame = resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": cold}, 0.3))
    redis_store.pause()
    try:
        with connect(process.socket) as raw:
            began = time.monotonic()
            raw.sendall(frame)
            reply = raw.recv(1000)
            assert 0.25 < time.monotonic() - began < 3
            assert reply.startswith(b"-UNAVAILABLE redis+unix://"), reply
    finally:
        redis_store.resume()
    redis_store.stop()
    with pytest.raises(StoreUnavailable, match=r"s\.sock: redis\+unix://"):
        process.client().lookup("feed@v1", {"item": cold})
    process.client().lookup("feed@v1", {"item": release.hot["item"][:50]})  # the cache still answers
    assert int(process.client().info()["total_error_replies"]) == 2


def test_sigterm_with_a_look_up_in_a_thread(start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    process = start(url=redis_store.url)
    cold = {"item": np.setdiff1d(np.arange(5000), release.hot["item"])[:50]}
    client = process.client()
    client.manifest("feed@v1")
    redis_store.pause()
    timer = threading.Timer(0.8, redis_store.resume)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.lookup, "feed@v1", cold)
            time.sleep(0.3)
            process.process.send_signal(signal.SIGTERM)
            timer.start()
            table = waiting.result(20).tables["item"]
            np.testing.assert_array_equal(
                table.rows[table.index].view(np.float16), release.expected("item", cold["item"])
            )
    finally:
        timer.join()
    assert process.wait() == (0, "")
    assert not process.socket.exists()


HUNG_SECONDS = 15  # within which it ends; what waits for the store below would take a minute


@pytest.mark.parametrize("poll_seconds", ["0", "0.05"])
def test_a_store_that_hangs_does_not_hold_up_the_end(start, redis_store, release, poll_seconds: str) -> None:  # type: ignore[no-untyped-def]
    """Look-ups of a minute, one that ends in time, a list of releases, and whatever runs in the background."""
    process = start("--drain-seconds", "2", "--poll-seconds", poll_seconds, url=f"{redis_store.url}?timeout=60")
    cold = np.setdiff1d(np.arange(5000), release.hot["item"])[:2]
    with ExitStack() as sockets:
        long, short, listing = (sockets.enter_context(connect(process.socket)) for _ in range(3))
        redis_store.pause()
        try:
            long.sendall(resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": cold[:1]}, 60.0)))
            listing.sendall(resp.command(b"TR.RELEASES"))
            client = process.client()
            until(lambda: client.info()["lookups_waiting"] == "1", "the look-up waits")
            short.sendall(resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": cold[1:]}, 0.5)))
            until(lambda: client.info()["lookups_waiting"] == "2", "the other one too")
            process.process.send_signal(signal.SIGTERM)
            assert short.recv(1000).startswith(b"-UNAVAILABLE ")
            assert process.process.wait(HUNG_SECONDS) == 0
        finally:
            redis_store.resume()
    code, errors = process.wait()
    assert code == 0
    assert "2 connections were still busy after 2 s" in errors
    assert "threads still wait for the store; they are not waited for" in errors
    assert not process.socket.exists()


def test_a_store_that_hangs_while_it_is_warmed_from_does_not_hold_up_the_end(  # type: ignore[no-untyped-def]
    redis_store, socket_folder: Path
) -> None:
    command = [sys.executable, "-m", "torchrank.cli", "sidecar", "--store", f"{redis_store.url}?timeout=60"]
    command += ["--socket", str(socket_folder / "s.sock"), "--metrics", "127.0.0.1:0"]
    redis_store.pause()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "metrics: http://" in process.stderr.readline()  # by then it heeds signals, and begins to warm
            process.send_signal(signal.SIGTERM)
            assert process.wait(HUNG_SECONDS) == 0
        finally:
            process.kill()
            redis_store.resume()
