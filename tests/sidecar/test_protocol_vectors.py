"""The test vectors of docs/protocol.md, read from there: what other languages' clients are built on."""

from __future__ import annotations

import re
import socket
import struct
from pathlib import Path

import numpy as np
import pytest

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
    np.testing.assert_array_equal(request.counts, [3, 0])
    np.testing.assert_array_equal(request.ids, [7, -1, 7])
    assert request.ids.dtype == request.counts.dtype == np.int64
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


def test_reply() -> None:
    rows = np.array([[1, 2, 3, 4, 5, 6], [9, 9, 9, 9, 9, 9]], np.uint8)[[0, 1, 0]]
    layout, counts = ReplyLayout("feed@v1", [6, 4]), np.array([3, 0])
    places = layout.places(counts)
    out = np.full(places.bytes, 77, np.uint8)  # every byte is to be overwritten
    status = layout.prepare(out, counts, places)
    out[places.starts[0] : places.starts[0] + rows.size] = rows.reshape(-1)
    status[:] = (0, 1, 0)
    assert out.tobytes() == VECTORS["reply"]

    (found, found_status), (none, _) = layout.read(out, counts)
    np.testing.assert_array_equal(found, rows)
    np.testing.assert_array_equal(found_status, [0, 1, 0])
    assert none.shape == (0, 4)
    assert np.shares_memory(found, out)


def test_a_degraded_reply() -> None:
    payload = np.frombuffer(VECTORS["degraded reply"], np.uint8)
    (rows, status), _ = ReplyLayout("feed@v1", [6, 4]).read(payload, np.array([3, 0]))
    np.testing.assert_array_equal(status, [STALE, UNAVAILABLE, UNAVAILABLE])
    np.testing.assert_array_equal(rows, [[1, 2, 3, 4, 5, 6], [9] * 6, [9] * 6])


@pytest.mark.parametrize("seed", range(30))
def test_replies_are_laid_out_as_the_document_says(seed: int) -> None:
    """Against a plain writing-down of the document's table."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, rng.integers(0, 6))
    widths = rng.integers(1, 20, len(counts))
    rows = [rng.integers(0, 256, (count, width), np.uint8) for count, width in zip(counts, widths, strict=True)]
    statuses = rng.integers(0, 4, counts.sum(), np.uint8)
    name = "m@" + "x" * int(rng.integers(1, 10))

    def pad(data: bytes) -> bytes:
        return data + bytes(-len(data) % 8)

    expected = b"TRR1" + struct.pack("<HHQ", len(counts), len(name), 0)
    expected += b"".join(struct.pack("<II", *shape) for shape in zip(counts, widths, strict=True)) + pad(name.encode())
    expected += b"".join(pad(some.tobytes()) for some in rows) + pad(statuses.tobytes())

    layout = ReplyLayout(name, widths.tolist())
    places = layout.places(counts)
    out = np.full(places.bytes, 77, np.uint8)
    status = layout.prepare(out, counts, places)
    for start, some in zip(places.starts, rows, strict=True):
        out[start : start + some.size] = some.reshape(-1)
    status[:] = statuses
    assert out.tobytes() == expected
    for (found, _), some in zip(layout.read(out, counts), rows, strict=True):
        np.testing.assert_array_equal(found, some)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="request"):
        request_names(decode_request(bytearray(VECTORS[name])))


def test_a_reply_of_another_look_up_is_refused() -> None:
    payload, counts = np.frombuffer(VECTORS["reply"], np.uint8).copy(), np.array([3, 0])
    layout = ReplyLayout("feed@v1", [6, 4])
    with pytest.raises(ProtocolError, match="reply of 72 bytes; the look-up's answer has 80"):
        layout.read(payload, np.array([5, 0]))
    with pytest.raises(
        ProtocolError, match=r"row bytes \[\[3, 6\], \[0, 4\]\].*asked: 2 tables, \[\(3, 6\), \(0, 5\)\]"
    ):
        ReplyLayout("feed@v1", [6, 5]).read(payload, counts)
    with pytest.raises(ProtocolError, match=r"of release b'feed@v1.*asked: .* of feed@v2"):
        ReplyLayout("feed@v2", [6, 4]).read(payload, counts)
    payload[-8] = 4
    with pytest.raises(ProtocolError, match="status 4"):
        layout.read(payload, counts)
    payload[-8], payload[0] = 3, 0
    with pytest.raises(ProtocolError, match=r"reply starts with b'\\x00RR1'"):
        layout.read(payload, counts)


def test_on_the_wire(sidecar) -> None:  # type: ignore[no-untyped-def]
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(sidecar.socket))
        raw.sendall(VECTORS["command"])
        assert raw.recv(1000) == VECTORS["answer"]
        for name in REFUSED:  # the connection outlives them all
            raw.sendall(resp.command(b"TR.LOOKUP", VECTORS[name]))
            assert raw.recv(1000).startswith(b"-PROTOCOL request"), name
