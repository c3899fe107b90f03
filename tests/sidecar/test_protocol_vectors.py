"""The test vectors of docs/protocol.md, read from there: what other languages' clients are built on."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import numpy as np
import pytest

from embedding_store import resp
from embedding_store.errors import ProtocolError
from embedding_store.lookup import LookupReply, TableRows
from embedding_store.protocol import decode_reply, decode_request, encode_request, reply_bytes, write_reply

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
IDS = {"item": np.array([7, -1, 7]), "größe": np.array([], np.int64)}


def read_vectors() -> dict[str, bytes]:
    found = re.findall(r"^```vector (.+)\n((?:.+\n)+?)```$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: bytes.fromhex(re.sub(r"#.*", "", content)) for name, content in found}


VECTORS = read_vectors()
REFUSED = [name for name in VECTORS if name.startswith("refused")]


def test_all_vectors_were_read() -> None:
    assert set(VECTORS) - set(REFUSED) == {"request", "reply", "command", "answer"}
    assert len(VECTORS) == DOCUMENT.read_text().count("```vector") == 11


def test_request() -> None:
    assert encode_request("feed@v1", IDS, 0.25) == VECTORS["request"]
    request = decode_request(bytearray(VECTORS["request"]))
    assert (request.release, request.timeout, list(request.ids)) == ("feed@v1", 0.25, ["item", "größe"])
    np.testing.assert_array_equal(request.ids["item"], [7, -1, 7])
    assert request.ids["größe"].shape == (0,)
    assert all(ids.dtype == np.int64 and ids.flags.aligned and not ids.flags.owndata for ids in request.ids.values())


def test_reply() -> None:
    rows = np.array([[1, 2, 3, 4, 5, 6], [9, 9, 9, 9, 9, 9]], np.uint8)
    empty = TableRows(np.empty((0, 4), np.uint8), np.empty(0, np.uint8), np.empty(0, np.int64))
    item = TableRows(rows, np.array([0, 1], np.uint8), np.array([0, 1, 0]))
    out = np.full(reply_bytes("feed@v1", [(3, 6), (0, 4)]), 77, np.uint8)  # every byte is to be overwritten
    write_reply(LookupReply("feed@v1", {"item": item, "größe": empty}), out)
    assert out.tobytes() == VECTORS["reply"]

    decoded = decode_reply(out, "feed@v1", {"item": (3, 6), "größe": (0, 4)})
    np.testing.assert_array_equal(decoded["item"][0], rows[[0, 1, 0]])
    np.testing.assert_array_equal(decoded["item"][1], [0, 1, 0])
    assert decoded["größe"][0].shape == (0, 4)
    assert np.shares_memory(decoded["item"][0], out)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="request"):
        decode_request(bytearray(VECTORS[name]))


def test_a_reply_of_another_look_up_is_refused() -> None:
    payload = np.frombuffer(VECTORS["reply"], np.uint8).copy()
    good = {"item": (3, 6), "größe": (0, 4)}
    with pytest.raises(ProtocolError, match="reply of 72 bytes"):
        decode_reply(payload, "feed@v1", {"item": (5, 6), "größe": (0, 4)})
    with pytest.raises(ProtocolError, match=r"row sizes are \[\(3, 6\), \(0, 4\)\]"):
        decode_reply(payload, "feed@v1", {"item": (3, 6), "größe": (0, 5)})
    with pytest.raises(ProtocolError, match="another release than feed@v2"):
        decode_reply(payload, "feed@v2", good)
    payload[-8] = 4
    with pytest.raises(ProtocolError, match="status 4"):
        decode_reply(payload, "feed@v1", good)


def test_on_the_wire(sidecar) -> None:  # type: ignore[no-untyped-def]
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(sidecar.socket))
        raw.sendall(VECTORS["command"])
        assert raw.recv(1000) == VECTORS["answer"]
        for name in REFUSED:  # the connection outlives them all
            raw.sendall(resp.command(b"TR.LOOKUP", VECTORS[name]))
            assert raw.recv(1000).startswith(b"-PROTOCOL request"), name
