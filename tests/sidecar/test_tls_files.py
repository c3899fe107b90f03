"""TLS files that change under a listener of this process: what fails is told once, and tried until it works."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_store.sidecar_listeners import Listeners
from embedding_store.sidecar_options import SidecarOptions
from embedding_store.sidecar_tls import ServerTls
from tests.sidecar.certificates import Authority

POLL = 0.02


class Files:
    """Of one certificate, by an authority whose next ones have other names."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "ca")
        self.certificate, self.key = folder / "its.pem", folder / "its.key"
        self.replace("first")

    def replace(self, name: str) -> None:
        for source, target in zip(self.authority.issue(name), (self.certificate, self.key), strict=True):
            source.replace(target)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def unix() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket may not be long
        yield Path(folder) / "s.sock"


def test_files_are_read_until_they_can_be_used(files: Files) -> None:
    tls = ServerTls(files.certificate, files.key)
    assert not tls.reload()
    content, before = files.certificate.read_bytes(), tls.context
    files.certificate.write_text("nothing of use")
    for _ in range(2):
        with pytest.raises(ValueError, match="are no PEM certificate"):
            tls.reload()
    assert tls.context is before
    files.certificate.write_bytes(content)
    assert tls.reload()
    assert tls.context is not before
    assert not tls.reload()


def test_who_may_read_them_counts_as_a_change(files: Files) -> None:
    tls = ServerTls(files.certificate, files.key)
    stat = files.key.stat()
    files.key.chmod(0o640)
    assert (files.key.stat().st_mtime_ns, files.key.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    assert tls.reload()


class Unlistening(Listeners):
    """Which cannot listen on TCP while `failing`, as where no file can be opened any more."""

    failing = False
    failed = 0

    async def _serve_tcp(self, listener: socket.socket) -> asyncio.Server:
        if self.failing:
            self.failed += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return await super()._serve_tcp(listener)


def shown(port: int, authority: Authority) -> str:
    """Common name of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=authority.ca)
    with (
        socket.create_connection(("127.0.0.1", port), 5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as raw,
    ):
        subject = dict(part[0] for part in (raw.getpeercert() or {})["subject"])
        return str(subject["commonName"])


def test_a_failure_to_listen_anew_leaves_all_as_it_is_and_is_tried_again(
    files: Files, unix: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tls = ServerTls(files.certificate, files.key)
    options = SidecarOptions(socket=unix, listen=("127.0.0.1", 0), tls=tls, poll_seconds=POLL, password="secret")
    caplog.set_level(logging.INFO)

    def told(text: str) -> int:
        return sum(text in record.message for record in caplog.records)

    async def main() -> None:
        listeners = Unlistening(options, asyncio.Protocol)
        await listeners.open()
        port = int(listeners.addresses[1].rpartition(":")[2])
        following = asyncio.ensure_future(listeners.follow_files())

        async def sees() -> str:
            return await asyncio.to_thread(shown, port, files.authority)

        async def until(what: str) -> None:
            async with asyncio.timeout(20):
                while await sees() != what:
                    await asyncio.sleep(POLL)

        assert await sees() == "first"
        listeners.failing = True
        files.replace("second")
        async with asyncio.timeout(20):
            while listeners.failed < 3:
                await asyncio.sleep(POLL)
        assert await sees() == "first"
        assert told("cannot listen anew, new connections get the TLS files of before until then: [Errno 24]") == 1
        listeners.failing = False
        await until("second")
        assert told("new connections get the TLS certificate that was read just now") == 1
        files.replace("third")
        await until("third")
        assert {await sees() for _ in range(10)} == {"third"}
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(unix))
        assert not following.done()
        following.cancel()
        listeners.close()
        await asyncio.sleep(POLL)
        with pytest.raises(ConnectionRefusedError):
            await sees()

    asyncio.run(main())
