"""The test vectors of docs/protocol.md, read from there: what other languages' clients are built on."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store import resp
from embedding_store.errors import ProtocolError
from embedding_store.lookup import STALE, UNAVAILABLE
from embedding_store.protocol import ReplyLayout, decode_request, encode_request, request_names

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
IDS = {"item": np.array([7, -1, 7]), "größe": np.array([], np.int64)}


def read_vectors() -> dict[str, bytes]:
    found = re.findall(r"^```vector (.+)\n((?:.+\n)+?)```$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: bytes.fromhex(re.sub(r"#.*", "", content)) for name, content in found}


VECTORS = read_vectors()
REFUSED = [name for name in VECTORS if name.startswith("refused")]


def test_all_vectors_were_read() -> None:
    assert set(VECTORS) - set(REFUSED) == {"request", "reply", "degraded reply", "command", "answer"}
    assert len(VECTORS) == DOCUMENT.read_text().count("```vector") == 12


def test_request() -> None:
    assert encode_request("feed@v1", IDS, 0.25) == VECTORS["request"]
    request = decode_request(bytearray(VECTORS["request"]))
    assert request_names(request) == ("feed@v1", ("item", "größe"))
    assert request.timeout == 0.25
    assert request.counts == [3, 0]
    np.testing.assert_array_equal(request.ids, [7, -1, 7])
    assert request.ids.dtype == np.int64
    assert request.ids.flags.aligned
    assert not request.ids.flags.owndata


def test_requests_of_the_same_tables_have_the_same_key_and_others_have_not() -> None:
    def key(release: str, *tables: str, count: int = 1) -> bytes:
        ids = {table: np.arange(count) for table in tables}
        return decode_request(bytearray(encode_request(release, ids, 0.5 * count))).key

    assert key("m@1", "a", "b") == key("m@1", "a", "b", count=7)
    other = [
        ("m@1", "b", "a"),
        ("m@1", "ab"),
        ("m@", "1a", "b"),
        ("m@2", "a", "b"),
        ("m@1", "a", "b", "c"),
        ("m@1a", "b"),
    ]
    assert len({key("m@1", "a", "b"), *[key(*names) for names in other]}) == len(other) + 1


def laid_out(layout: ReplyLayout, rows: list[NDArray[np.uint8]], status: NDArray[np.uint8]) -> bytes:
    """A reply as a sidecar writes it."""
    counts = [len(some) for some in rows]
    places = layout.places(counts)
    payload = bytearray(places.bytes)
    head = layout.head(counts)
    payload[: len(head)] = head
    for start, some in zip(places.starts, rows, strict=True):
        payload[start : start + some.size] = some.tobytes()
    payload[places.status : places.status + len(status)] = status.tobytes()
    return bytes(payload)


def test_reply() -> None:
    rows = np.array([[1, 2, 3, 4, 5, 6], [9, 9, 9, 9, 9, 9]], np.uint8)[[0, 1, 0]]
    layout = ReplyLayout("feed@v1", [6, 4])
    assert laid_out(layout, [rows, np.empty((0, 4), np.uint8)], np.array([0, 1, 0], np.uint8)) == VECTORS["reply"]
    payload = np.frombuffer(VECTORS["reply"], np.uint8)
    layout.check(payload, layout.head([3, 0]), layout.places([3, 0]), 3)


def test_a_degraded_reply() -> None:
    layout = ReplyLayout("feed@v1", [6, 4])
    rows = np.array([[1, 2, 3, 4, 5, 6], [9] * 6, [9] * 6], np.uint8)
    status = np.array([STALE, UNAVAILABLE, UNAVAILABLE], np.uint8)
    assert laid_out(layout, [rows, np.empty((0, 4), np.uint8)], status) == VECTORS["degraded reply"]
    payload = np.frombuffer(VECTORS["degraded reply"], np.uint8)
    layout.check(payload, layout.head([3, 0]), layout.places([3, 0]), 3)


@pytest.mark.parametrize("seed", range(30))
def test_replies_are_laid_out_as_the_document_says(seed: int) -> None:
    """Against a plain writing-down of the document's table."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, rng.integers(0, 6)).tolist()
    widths = rng.integers(1, 20, len(counts)).tolist()
    rows = [rng.integers(0, 256, shape, np.uint8) for shape in zip(counts, widths, strict=True)]
    statuses = rng.integers(0, 4, sum(counts), np.uint8)
    name = "m@" + "x" * int(rng.integers(1, 10))

    def pad(data: bytes) -> bytes:
        return data + bytes(-len(data) % 8)

    expected = b"TRR1" + struct.pack("<HHQ", len(counts), len(name), 0)
    expected += b"".join(struct.pack("<II", *shape) for shape in zip(counts, widths, strict=True)) + pad(name.encode())
    expected += b"".join(pad(some.tobytes()) for some in rows) + pad(statuses.tobytes())

    layout = ReplyLayout(name, widths)
    assert laid_out(layout, rows, statuses) == expected
    layout.check(np.frombuffer(expected, np.uint8), layout.head(counts), layout.places(counts), sum(counts))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="request"):
        request_names(decode_request(bytearray(VECTORS[name])))


def test_a_reply_of_another_look_up_is_refused() -> None:
    payload = np.frombuffer(VECTORS["reply"], np.uint8).copy()

    def check(release: str, counts: list[int], widths: list[int]) -> None:
        layout = ReplyLayout(release, widths)
        layout.check(payload, layout.head(counts), layout.places(counts), sum(counts))

    with pytest.raises(ProtocolError, match="reply of 72 bytes; the look-up's answer has 80"):
        check("feed@v1", [5, 0], [6, 4])
    with pytest.raises(ProtocolError, match=r"\[\[3, 6\], \[0, 4\]\].*asked: 2 tables, \[\[3, 6\], \[0, 5\]\]"):
        check("feed@v1", [3, 0], [6, 5])
    with pytest.raises(ProtocolError, match=r"of release b'feed@v1.*asked: .* of feed@v2"):
        check("feed@v2", [3, 0], [6, 4])
    payload[-8] = 4
    with pytest.raises(ProtocolError, match="status 4"):
        check("feed@v1", [3, 0], [6, 4])
    payload[-8], payload[0] = 3, 0
    with pytest.raises(ProtocolError, match=r"reply starts with b'\\x00RR1'"):
        check("feed@v1", [3, 0], [6, 4])


def test_on_the_wire(sidecar) -> None:  # type: ignore[no-untyped-def]
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(sidecar.socket))
        raw.sendall(VECTORS["command"])
        assert raw.recv(1000) == VECTORS["answer"]
        for name in REFUSED:  # the connection outlives them all
            raw.sendall(resp.command(b"TR.LOOKUP", VECTORS[name]))
            assert raw.recv(1000).startswith(b"-PROTOCOL request"), name
