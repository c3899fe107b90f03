"""A real sidecar, spoken to by redis-cli, by redis-py and by plain sockets."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from embedding_store import resp
from embedding_store.protocol import ReplyLayout, encode_request
from embedding_store.release import ReleaseManifest


def redis_cli(path: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    executable = shutil.which("redis-cli")
    if executable is None:
        raise RuntimeError("no redis-cli on PATH: install it (apt-get install redis-tools); these tests need one")
    run = subprocess.run(
        [executable, "-s", str(path), *arguments], capture_output=True, text=True, timeout=20, env=env, check=False
    )
    assert not run.stderr, run.stderr
    return run.stdout


@pytest.fixture(params=[2, 3], ids=["resp2", "resp3"])
def connected(request, sidecar):  # type: ignore[no-untyped-def]
    with redis.Redis(unix_socket_path=str(sidecar.socket), protocol=request.param) as client:
        yield client


def test_redis_cli(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    assert redis_cli(sidecar.socket, "PING") == "PONG\n"
    assert redis_cli(sidecar.socket, "-3", "PING", "hello") == "hello\n"
    hello = redis_cli(sidecar.socket, "HELLO", "3").split("\n")
    assert hello[:1] == ["server torchrank-sidecar"] or hello[:2] == ["server", "torchrank-sidecar"]
    assert "cache_hit_rate:" in redis_cli(sidecar.socket, "INFO", "lookups")
    manifest = msgspec.json.decode(redis_cli(sidecar.socket, "tr.info", "feed"), type=ReleaseManifest)
    assert manifest == release.manifest
    assert json.loads(redis_cli(sidecar.socket, "TR.RELEASES"))[0]["active"] is True
    assert redis_cli(sidecar.socket, "GET", "x").startswith("ERR unknown command 'GET'; known are: TR.LOOKUP, ")
    assert redis_cli(sidecar.socket, "TR.INFO", "feed@v9").startswith("UNKNOWNRELEASE no release 'feed@v9'")
    assert redis_cli(sidecar.socket, "TR.INFO", "shop").startswith("UNKNOWNRELEASE ")


def test_redis_py_looks_up(connected, release) -> None:  # type: ignore[no-untyped-def]
    ids = release.random_ids(np.random.default_rng(11), 300)
    payload = connected.execute_command("TR.LOOKUP", encode_request("feed@v1", ids))
    layout = ReplyLayout("feed@v1", [release.manifest.table(name).row_bytes for name in ids])
    places = layout.places([300] * len(ids))
    layout.check(np.frombuffer(payload, np.uint8), layout.head([300] * len(ids)), places, 300 * len(ids))
    statuses = np.frombuffer(payload, np.uint8, 300 * len(ids), places.status).reshape(len(ids), 300)
    for (name, wanted), start, status in zip(ids.items(), places.starts, statuses, strict=True):
        rows = np.frombuffer(payload, np.float16, release.tables[name].shape[1] * 300, start).reshape(300, -1)
        np.testing.assert_array_equal(rows, release.expected(name, wanted))
        np.testing.assert_array_equal(status == 1, (wanted < 0) | (wanted >= len(release.tables[name])))


def test_redis_py_speaks_the_usual_commands(connected) -> None:  # type: ignore[no-untyped-def]
    assert connected.ping() is True
    assert connected.client_setname("someone") in (True, "OK")
    assert connected.client_getname() in ("someone", b"someone")
    assert connected.client_id() > 0
    assert connected.execute_command("COMMAND COUNT") == 11
    assert {"tr.lookup", "ping"} <= {name.lower() for name in connected.command()}
    info = connected.info()
    assert info["process_id"] > 0
    assert info["cache_bytes"] <= info["cache_capacity_bytes"] == 512 << 20
    assert info["feed@v1"]["tables"] == 3
    assert set(connected.info("memory")) == {
        "used_memory_rss", "used_memory_rss_anonymous", "cache_bytes", "cache_capacity_bytes"
    }  # fmt: skip


def test_redis_py_over_tcp(sidecar) -> None:  # type: ignore[no-untyped-def]
    with redis.Redis(port=sidecar.tcp_port) as client:
        assert client.ping() is True


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ((b"TR.LOOKUP",), "wrong number of arguments for 'TR.LOOKUP'"),
        ((b"TR.RELEASES", b"x"), "wrong number of arguments"),
        ((b"HELLO", b"4"), "unsupported protocol version; 2 and 3 are spoken here"),
        ((b"HELLO", b"3", b"SETNAME"), "syntax error in HELLO option 'SETNAME'"),
        ((b"AUTH", b"secret"), "this sidecar has no password"),
        ((b"CLIENT", b"KILL"), "'CLIENT KILL'"),
        ((b"TR.INFO", b"\xff"), "is not UTF-8"),
        ((b"\xff\r\n\x00",), r"unknown command"),
        ((b"TR.LOOKUP", encode_request("feed@v1", {"nope": np.array([1])})), "release feed@v1 has no table 'nope'"),
        ((b"TR.LOOKUP", encode_request("feed@v0", {"item": np.array([1])})), "no release 'feed@v0'"),
        ((b"TR.LOOKUP", encode_request("../../x@y", {"item": np.array([1])})), "no release '../../x@y'"),
        (
            (b"TR.LOOKUP", encode_request("feed@v1", {"item": np.zeros(600_000, np.int64)})),
            "the reply would have 19800032 bytes; at most 16777216 are sent",
        ),
    ],
)
def test_refused_commands_leave_the_connection_as_it_was(connected, command, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(redis.ResponseError) as caught:
        connected.execute_command(*command)
    assert message in str(caught.value)
    assert connected.ping() is True


def test_pipelined_commands_are_answered_in_order(sidecar) -> None:  # type: ignore[no-untyped-def]
    """TR.RELEASES goes to a thread, PING does not: it must not overtake. More than one turn of the loop takes."""
    commands, expected = [], []
    for number in range(500):
        commands.append(resp.command(b"PING", b"%d" % number))
        expected.append(resp.bulk(b"%d" % number))
        if number % 50 == 0:
            commands.append(resp.command(b"TR.LOOKUP", b"x"))
            expected.append(b"-PROTOCOL request of 1 bytes; its header alone has 16\r\n")
        if number % 100 == 0:
            commands.append(resp.command(b"TR.RELEASES"))
            expected.append(None)
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(str(sidecar.socket))
        raw.sendall(b"".join(commands))
        raw.shutdown(socket.SHUT_WR)  # what was asked before the end is still answered
        received = b""
        while chunk := raw.recv(1 << 16):
            received += chunk
    releases = received[received.index(b"$", received.index(b"[") - 10) :]
    releases = releases[: releases.index(b"]") + 3]
    assert received == b"".join(releases if part is None else part for part in expected)


def test_quit_closes_and_answers_nothing_after_it(sidecar) -> None:  # type: ignore[no-untyped-def]
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(str(sidecar.socket))
        raw.sendall(resp.command(b"PING") + resp.command(b"quit") + resp.command(b"PING"))
        received = b""
        while chunk := raw.recv(100):
            received += chunk
        assert received == b"+PONG\r\n+OK\r\n"


def test_a_peer_that_does_not_read_is_not_read_from(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    """200 replies of 320 kB are asked for at once and read late: all come, and meanwhile others are answered."""
    ids = np.arange(10_000) % 5000
    frame = resp.command(b"TR.LOOKUP", encode_request("feed@v1", {"item": ids}))
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(20)
        raw.connect(str(sidecar.socket))
        raw.setblocking(False)
        sent = 0
        stream = frame * 20
        while sent < len(stream):
            try:
                sent += raw.send(stream[sent : sent + (1 << 16)])
            except BlockingIOError:
                break
        assert sent < len(stream), "the sidecar took everything while nothing was read from it"
        with redis.Redis(unix_socket_path=str(sidecar.socket)) as other:
            assert other.ping() is True
        raw.settimeout(20)
        expected = 16 + 8 + 8 + 320_000 + 10_000
        body = b""
        while len(body) < expected + 11:
            body += raw.recv(1 << 20)
        rows = np.frombuffer(body, np.float16, 5000 * 16, body.index(b"\r\n") + 2 + 32)
        np.testing.assert_array_equal(rows.reshape(5000, 16), release.tables["item"])


def test_password(start, tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "password").write_text("correct horse\n")
    process = start("--password-file", str(tmp_path / "password"))
    assert redis_cli(process.socket, "PING") == "NOAUTH Authentication required.\n\n"
    assert redis_cli(process.socket, "AUTH", "wrong").startswith("WRONGPASS")
    assert redis_cli(process.socket, "-a", "correct horse", "--no-auth-warning", "PING") == "PONG\n"
    for protocol in (2, 3):
        with redis.Redis(unix_socket_path=str(process.socket), password="correct horse", protocol=protocol) as client:
            assert client.ping() is True
    with (
        pytest.raises(redis.ConnectionError, match="already authenticated"),
        redis.Redis(unix_socket_path=str(process.socket), protocol=3, retry=Retry(NoBackoff(), 0)) as client,
    ):
        client.ping()
    process.client(password="correct horse").ping()
    with pytest.raises(Exception, match="WRONGPASS invalid password"):
        process.client(password="wrong").ping()
    assert "correct horse" not in Path(f"/proc/{process.process.pid}/cmdline").read_text()


def test_password_of_the_environment(start) -> None:  # type: ignore[no-untyped-def]
    process = start(environment={"TORCHRANK_SIDECAR_PASSWORD": "s3cret"})
    assert redis_cli(process.socket, "PING").startswith("NOAUTH")
    assert redis_cli(process.socket, "-a", "s3cret", "--no-auth-warning", "PING") == "PONG\n"
