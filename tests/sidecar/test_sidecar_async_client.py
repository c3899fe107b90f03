"""AsyncSidecarClient against real sidecars, on asyncio's loop and on uvloop's."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import numpy as np
import pytest
import uvloop
from numpy.typing import NDArray

from embedding_store.client_async import AsyncSidecarClient
from embedding_store.errors import ProtocolError, StoreUnavailable, UnknownRelease, UnknownTable
from tests.sidecar.certificates import Authority

Run = Callable[[Coroutine[None, None, None]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


async def check(client: AsyncSidecarClient, release, ids: dict[str, NDArray[np.int64]], **options: float) -> None:  # type: ignore[no-untyped-def]
    """Every row equals plain numpy indexing, and so does every status."""
    reply = await client.lookup(release.manifest.name, ids, **options)
    assert reply.release == release.manifest.name
    assert list(reply.tables) == list(ids)
    for name, wanted in ids.items():
        table = reply.tables[name]
        np.testing.assert_array_equal(table.rows[table.index].view(np.float16), release.expected(name, wanted))
        known = (wanted >= 0) & (wanted < len(release.tables[name]))
        np.testing.assert_array_equal(table.status[table.index] == 0, known)


def test_values(run: Run, sidecar, release) -> None:  # type: ignore[no-untyped-def]
    async def work() -> None:
        async with AsyncSidecarClient(sidecar.address) as client:
            for seed in range(20):
                rng = np.random.default_rng(seed)
                ids = {
                    name: rng.integers(-5, len(rows) + 5, rng.choice((0, 1, 40, 2000)))
                    for name, rows in release.tables.items()
                    if rng.random() < 0.8
                }
                await check(client, release, ids)
            assert await client.manifest() == await client.manifest(model="feed") == release.manifest
            assert [entry.release for entry in await client.releases()] == ["feed@v1"]
            assert int((await client.info())["lookups"]) > 0
            await client.ping()
        async with AsyncSidecarClient(f"tcp://127.0.0.1:{sidecar.tcp_port}") as client:
            await check(client, release, release.random_ids(np.random.default_rng(3), 5000))

    run(work())


def test_hundreds_of_calls_at_once_over_three_connections(run: Run, start, release) -> None:  # type: ignore[no-untyped-def]
    """Nobody gets another's rows, and no more connections are opened than were allowed."""
    process = start()

    async def work() -> None:
        async with AsyncSidecarClient(process.address, connections=3, timeout=60) as client:
            rng = np.random.default_rng(9)
            requests = [release.random_ids(rng, int(rng.integers(1, 300))) for _ in range(400)]
            await asyncio.gather(*[check(client, release, ids) for ids in requests])
            info = await client.info()
            assert int(info["lookups"]) == 400
            assert int(info["total_connections_received"]) == 3

    run(work())


def test_errors_leave_the_connection_as_it_was(run: Run, start, release) -> None:  # type: ignore[no-untyped-def]
    process = start("--max-frame", "64KiB")

    async def work() -> None:
        async with AsyncSidecarClient(process.address, connections=1) as client:
            with pytest.raises(UnknownRelease, match=f"{process.address}: no release 'feed@v2'"):
                await client.lookup("feed@v2", {"item": np.array([1])})
            with pytest.raises(UnknownTable, match="no table 'nope'; it has: item, user, category"):
                await client.lookup("feed@v1", {"nope": np.array([1])})
            with pytest.raises(ProtocolError, match=f"{process.address}: the reply would have"):
                await client.lookup("feed@v1", {"item": np.arange(4000)})
            await check(client, release, {"item": np.arange(10)})
            assert (await client.info())["total_connections_received"] == "1"

    run(work())


def test_a_cancelled_call_harms_no_other(run: Run, start, redis_store, release) -> None:  # type: ignore[no-untyped-def]
    process = start(url=redis_store.url)
    cold = np.setdiff1d(np.arange(5000), release.hot["item"])
    hot = {"item": release.hot["item"][:20]}

    async def work() -> None:
        async with AsyncSidecarClient(process.address, connections=2, timeout=20) as client:
            await check(client, release, hot)
            redis_store.pause()
            try:
                waiting = [asyncio.create_task(check(client, release, {"item": cold[:20]})) for _ in range(2)]
                await asyncio.sleep(0.3)
                waiting[0].cancel()
                await check(client, release, hot)  # on a new connection: the late answer is nobody's
                assert not waiting[1].done()
            finally:
                redis_store.resume()
            await waiting[1]
            with pytest.raises(asyncio.CancelledError):
                await waiting[0]

    run(work())


def test_deadlines(run: Run, start, release) -> None:  # type: ignore[no-untyped-def]
    process = start()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with AsyncSidecarClient(process.address, connections=1) as client:
            await check(client, release, {"item": np.arange(10)})
            os.kill(process.process.pid, signal.SIGSTOP)
            try:
                for ids in (np.arange(10), np.arange(500_000)):  # the latter fits no socket buffer
                    began = loop.time()
                    with pytest.raises(StoreUnavailable, match=r"s\.sock: no answer within 0\.200 s"):
                        await client.lookup("feed@v1", {"item": ids}, timeout=0.2)
                    assert 0.15 < loop.time() - began < 5
            finally:
                os.kill(process.process.pid, signal.SIGCONT)
            await check(client, release, {"item": np.arange(20, 60)})

    run(work())


def test_reconnects_after_a_restart(run: Run, start, release) -> None:  # type: ignore[no-untyped-def]
    process = start()

    async def work() -> None:
        async with AsyncSidecarClient(process.address) as client:
            await check(client, release, {"item": np.arange(10)})
            assert process.stop(signal.SIGKILL)[0] == -signal.SIGKILL
            with pytest.raises(StoreUnavailable, match=r"s\.sock cannot be reached: Connection refused"):
                await client.ping()
            start()
            await check(client, release, {"item": np.arange(10)})
        with pytest.raises(StoreUnavailable, match="this client was closed"):
            await client.ping()

    run(work())


def test_turned_away_and_passwords(run: Run, start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "password").write_text("correct horse\n")
    process = start("--max-connections", "1", "--password-file", str(tmp_path / "password"))

    async def work() -> None:
        async with AsyncSidecarClient(process.address, password="correct horse") as client:
            await client.ping()
            async with AsyncSidecarClient(process.address, password="correct horse") as other:
                # The sidecar may have closed before the command is written: then the reason is lost.
                with pytest.raises(StoreUnavailable, match=r"max number of clients reached|cannot be reached"):
                    await other.ping()
            await client.ping()
        await asyncio.sleep(0.2)
        async with AsyncSidecarClient(process.address, password="wrong") as client:
            with pytest.raises(Exception, match="WRONGPASS invalid password"):
                await client.ping()

    run(work())


def test_over_tls(run: Run, start, release, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("server")
    process = start("--listen", "127.0.0.1:0", "--tls-cert", str(certificate), "--tls-key", str(key))
    address = f"tls://127.0.0.1:{process.tcp_port}"

    async def work() -> None:
        async with AsyncSidecarClient(f"{address}?ca_file={authority.ca}", connections=4) as client:
            rng = np.random.default_rng(2)
            await asyncio.gather(*[check(client, release, release.random_ids(rng, 3000)) for _ in range(20)])
        async with AsyncSidecarClient(address) as client:
            with pytest.raises(StoreUnavailable, match="certificate verify failed"):
                await client.ping()

    run(work())


def test_nobody_there(run: Run, tmp_path: Path) -> None:
    async def work() -> None:
        async with AsyncSidecarClient(f"unix://{tmp_path}/none.sock") as client:
            with pytest.raises(StoreUnavailable, match=r"none\.sock cannot be reached: No such file"):
                await client.ping()

    run(work())
