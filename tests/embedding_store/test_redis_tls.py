"""TLS to real servers, with certificates of the test's own: trusted or not, asked of the client; and a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from embedding_store.batch import batch_of
from embedding_store.errors import InvalidStoreURL, StoreUnavailable
from embedding_store.lookup import FOUND
from embedding_store.open import open_backend
from embedding_store.publish import publish
from embedding_store.releases import activate
from tests.embedding_store.bundles import Bundle, TestTable, check_rows, fetch, make_bundle
from tests.redis_cluster import RedisCluster
from tests.redis_server import RedisServer
from tests.sidecar.certificates import Authority

SOME = {"item": np.arange(300)}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle", seed=4, tables=(TestTable("item", "fp32", rows=60_000, dim=32),))


@pytest.fixture
def start(authority: Authority) -> Iterator[Callable[..., str]]:
    """start("--option", …, names=…): a server with such a certificate; gives HOST:PORT."""
    servers = []

    def start_one(*options: str, names: str = "IP:127.0.0.1") -> str:
        certificate = authority.issue(f"server{len(servers)}", names=names)
        servers.append(RedisServer(*options, tls=(authority.ca, *certificate)))
        return f"127.0.0.1:{servers[-1].tls_port}"

    yield start_one
    for server in servers:
        server.close()


def test_rows_over_tls(start: Callable[..., str], authority: Authority, bundle: Bundle) -> None:
    """All rows in one fetch: more than the buffers of both sides hold, in both directions."""
    with open_backend(f"rediss://{start()}/2?ca_file={authority.ca}") as backend:
        publish(bundle.folder, backend)
        activate(backend, bundle.name)
        ids = np.random.default_rng(0).permutation(60_000)
        for _ in range(2):
            rows, found = fetch(backend, bundle.name, {"item": ids})["item"]
            check_rows(bundle, "item", ids, rows, found)


def test_a_server_that_is_not_to_be_trusted_is_refused(
    start: Callable[..., str], authority: Authority, bundle: Bundle, tmp_path: Path
) -> None:
    host = start()
    with open_backend(f"rediss://{host}?ca_file={authority.ca}") as backend:
        publish(bundle.folder, backend)
    other = Authority(tmp_path / "other")
    elsewhere = start(names="DNS:elsewhere.example")
    for url, why in (
        (f"rediss://{host}", "certificate verify failed"),  # by the system's authorities
        (f"rediss://{host}?ca_file={other.ca}", "certificate verify failed"),
        (f"rediss://{elsewhere}?ca_file={authority.ca}", "certificate is not valid for '127.0.0.1'"),
    ):
        with open_backend(url) as backend:
            with pytest.raises(StoreUnavailable, match=rf"rediss://{url.split('?')[0][9:]}/0 cannot be reached.*{why}"):
                backend.releases()
            fetched = fetch_without_control(url, bundle)
            assert why in str(fetched)


def fetch_without_control(url: str, bundle: Bundle) -> StoreUnavailable | None:
    """What the read path says, which does not go through redis-py."""
    from embedding_store.backend import namespace
    from embedding_store.redis_keys import Record
    from embedding_store.redis_read import RedisReader
    from embedding_store.redis_url import parse_redis_url

    with RedisReader(parse_redis_url(url)) as reader:
        record = Record(namespace(bundle.manifest), bundle.manifest)
        fetched = reader.fetch(record, batch_of(bundle.manifest, SOME), timeout=5)
        assert (fetched.error is None) == bool((fetched.status == FOUND).all())
        return fetched.error


def test_a_client_shows_its_certificate(start: Callable[..., str], authority: Authority, bundle: Bundle) -> None:
    host = start("--tls-auth-clients", "yes")
    certificate, key = authority.issue("client")
    both = certificate.with_name("client-and-key.pem")
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    trusted = f"rediss://{host}?ca_file={authority.ca}"
    for url in (f"{trusted}&cert_file={certificate}&key_file={key}", f"{trusted}&cert_file={both}"):
        with open_backend(url) as backend:
            publish(bundle.folder, backend)
            assert fetch(backend, bundle.name, SOME)["item"][1].all()
    with open_backend(trusted) as backend, pytest.raises(StoreUnavailable, match=rf"rediss://{host}/0 cannot be"):
        backend.releases()
    refused = fetch_without_control(trusted, bundle)
    assert f"rediss://{host}/0 cannot be reached" in str(refused)


def test_files_that_do_not_fit_are_told_before_anything_is_asked(authority: Authority, tmp_path: Path) -> None:
    certificate, _ = authority.issue("client")
    _, other_key = authority.issue("other")
    (tmp_path / "empty").write_text("")
    for options in (
        f"ca_file={tmp_path / 'empty'}",
        f"ca_file={authority.ca}&cert_file={certificate}&key_file={other_key}",
        f"cert_file={certificate}",  # without its key
    ):
        with pytest.raises(InvalidStoreURL, match="cannot use the TLS files"):
            open_backend(f"rediss://h?{options}")
    for url, message in (
        (
            f"redis://h?ca_file={authority.ca}",
            r"ca_file is for rediss:// and rediss\+cluster://; redis:// does not",
        ),
        (f"rediss://h?key_file={other_key}", "key_file is the key of cert_file, which the store URL does not give"),
    ):
        with pytest.raises(InvalidStoreURL, match=message):
            open_backend(url)


def test_a_cluster_over_tls(authority: Authority, bundle: Bundle) -> None:
    cluster = RedisCluster(tls=(authority.ca, *authority.issue("nodes")))
    try:
        with open_backend(f"{cluster.url}?ca_file={authority.ca}&replicas=yes") as backend:
            publish(bundle.folder, backend)
            ids = np.arange(60_000)
            rows, found = fetch(backend, bundle.name, {"item": ids})["item"]
            check_rows(bundle, "item", ids, rows, found)
    finally:
        cluster.close()
