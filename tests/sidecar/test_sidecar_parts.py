"""The small parts of the sidecar, each against a plain reference."""

from __future__ import annotations

import time

import numpy as np
import pytest

from embedding_store.batch import IdBatch
from embedding_store.byte_sizes import parse_size
from embedding_store.client_address import parse_address
from embedding_store.errors import InvalidRelease, InvalidStoreURL, UnknownRelease, UnknownTable
from embedding_store.memmap import MemmapBackend
from embedding_store.memory import MemoryStore
from embedding_store.served import Remainder, ServedStore
from embedding_store.sidecar_info import info_text
from embedding_store.sidecar_socket import parse_listen
from embedding_store.sidecar_stats import LatencyHistogram
from embedding_store.store import EmbeddingStore


def test_histogram_percentiles_are_at_most_a_bucket_above_the_true_ones() -> None:
    rng = np.random.default_rng(5)
    seconds = rng.lognormal(-8, 1.5, 5000)
    histogram = LatencyHistogram()
    for value in seconds:
        histogram.record(float(value))
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        true = float(np.quantile(seconds, share, method="inverted_cdf")) * 1e6
        assert true <= histogram.percentile(share) * (1 + 1e-9) <= true * 2 ** (1 / 8) * (1 + 1e-6)


def test_histogram_ends() -> None:
    histogram = LatencyHistogram()
    assert histogram.percentile(0.5) == 0
    histogram.record(0.0)
    assert histogram.percentile(0.5) == 1
    histogram.record(1e9)
    assert histogram.percentile(1.0) > 1e8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("16k", 16_000),
        ("0", 0),
        ("16777216", 1 << 24),
        ("2 TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e3", "5 parsecs", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number and a unit"):
        parse_size(text)


def test_listen_addresses() -> None:
    assert parse_listen("127.0.0.1:7070") == ("127.0.0.1", 7070)
    assert parse_listen("[::1]:0") == ("::1", 0)
    for text in ("7070", ":7070", "host:", "host:70000", "host:x"):
        with pytest.raises(ValueError, match="expected HOST:PORT"):
            parse_listen(text)


def test_client_addresses() -> None:
    assert parse_address("/run/x.sock").path == parse_address("unix:///run/x.sock").path == "/run/x.sock"
    tcp = parse_address("tcp://[::1]:7070")
    assert (tcp.host, tcp.port, tcp.path) == ("::1", 7070, "")
    for text in ("", "unix://", "tcp://host", "tcp://:1", "tcp://host:0", "http://host:1", "tcp://host:1?ca_file=x"):
        with pytest.raises(
            InvalidStoreURL,
            match=r"accepted: unix:///PATH, tcp://HOST:PORT, tls://HOST:PORT\[\?OPTION=FILE&…\] or a path",
        ):
            parse_address(text)


def test_info_sections() -> None:
    sections = {"Server": {"version": "1"}, "Memory": {"rss": 5, "cache": 6}}
    assert info_text(sections) == "# Server\r\nversion:1\r\n\r\n# Memory\r\nrss:5\r\ncache:6\r\n"
    assert info_text(sections, "memory") == "# Memory\r\nrss:5\r\ncache:6\r\n"
    assert info_text(sections, "nothing") == ""


def test_memory_store(release) -> None:  # type: ignore[no-untyped-def]
    store = MemoryStore()
    with pytest.raises(UnknownRelease, match="it has: none"):
        store.manifest("feed@v1")
    encoded = {name: rows.view(np.uint8) for name, rows in release.tables.items()}
    with pytest.raises(InvalidRelease, match=r"table 'item' is uint8 \(1, 32\)"):
        store.add(release.manifest, {**encoded, "item": encoded["item"][:1]})
    store.add(release.manifest, encoded)
    assert store.manifest() == store.manifest(model="feed") == release.manifest
    assert [(entry.release, entry.active) for entry in store.releases()] == [("feed@v1", True)]
    ids = release.random_ids(np.random.default_rng(1), 500)
    reply = store.lookup("feed@v1", ids)
    for name, wanted in ids.items():
        table = reply.tables[name]
        np.testing.assert_array_equal(table.rows[table.index].view(np.float16), release.expected(name, wanted))
        known = (wanted >= 0) & (wanted < len(release.tables[name]))
        np.testing.assert_array_equal(table.status[table.index] == 0, known)
    with pytest.raises(UnknownTable, match="no table 'nope'"):
        store.lookup("feed@v1", {"nope": ids["item"]})


class SlowDisk(MemmapBackend):
    """Mapped files whose pages take `seconds` to come."""

    seconds = 0.0

    def fetch(self, release, ids, *, timeout=None):  # type: ignore[no-untyped-def]
        time.sleep(self.seconds)
        return super().fetch(release, ids, timeout=timeout)


def test_a_slow_disk_is_waited_for_in_threads_and_a_quick_one_is_not(store_url: str) -> None:
    backend = SlowDisk(store_url.removeprefix("memmap://"))
    with ServedStore(EmbeddingStore(backend)) as served:  # no cache: every look-up fetches
        ids = np.arange(10)
        batch = IdBatch(np.array([0]), np.array([10]), ids)
        out, starts = np.empty(10 * served.manifest("feed@v1").tables[0].row_bytes, np.uint8), np.array([0])

        def begin() -> Remainder | None:
            return served.begin("feed@v1", batch, out, starts, np.empty(10, np.uint8))

        begin()  # compiles
        backend.seconds = 0.0
        for _ in range(100):
            remainder = begin()
            if remainder is not None:
                remainder(1.0)
        assert begin() is None
        backend.seconds = 0.03
        for _ in range(20):
            remainder = begin()
        assert remainder is not None
        backend.seconds = 0.0
        expected = served.lookup("feed@v1", {"item": ids}).tables["item"].rows.tobytes()
        for _ in range(100):
            out[:] = 0
            remainder = begin()
            if remainder is not None:
                remainder(1.0)
            assert out.tobytes() == expected
        assert begin() is None
