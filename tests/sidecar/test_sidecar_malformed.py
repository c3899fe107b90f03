"""What strangers send: garbage and lies about lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedding_store import resp
from embedding_store.errors import ProtocolError
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
