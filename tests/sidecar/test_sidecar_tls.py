"""TLS between real sidecars and clients, with certificates of the test's own."""

from __future__ import annotations

import signal
import socket
import ssl
from pathlib import Path

import numpy as np
import pytest
import redis
from click.testing import CliRunner
from redis.backoff import NoBackoff
from redis.retry import Retry

from embedding_store import resp
from embedding_store.client import SidecarClient
from embedding_store.errors import InvalidStoreURL, StoreUnavailable
from tests.redis_server import free_port
from tests.sidecar.certificates import Authority
from tests.sidecar.raw_socket import read_all
from tests.sidecar.test_sidecar_client import check
from torchrank.cli import cli


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ca")


@pytest.fixture
def server_options(authority: Authority) -> list[str]:
    certificate, key = authority.issue("server")
    return ["--listen", "127.0.0.1:0", "--tls-cert", str(certificate), "--tls-key", str(key)]


def test_look_ups_over_tls(start, release, authority: Authority, server_options: list[str]) -> None:  # type: ignore[no-untyped-def]
    process = start(*server_options)
    address = f"tls://127.0.0.1:{process.tcp_port}"
    assert f"tls://127.0.0.1:{process.tcp_port}" in process.ready
    with SidecarClient(f"{address}?ca_file={authority.ca}") as client:
        assert client.address == address
        for seed in range(5):
            check(client, release, release.random_ids(np.random.default_rng(seed), 4000))
    with (
        SidecarClient(address) as client,
        pytest.raises(StoreUnavailable, match=rf"{address} cannot be reached: .*certificate verify failed"),
    ):
        client.ping()
    with (
        SidecarClient(f"tcp://127.0.0.1:{process.tcp_port}", timeout=5) as client,
        pytest.raises(StoreUnavailable, match=r"cannot be reached|no answer"),
    ):
        client.ping()
    with redis.Redis(host="127.0.0.1", port=process.tcp_port, ssl=True, ssl_ca_certs=str(authority.ca)) as client:
        assert client.ping() is True
    assert process.stop()[0] == 0


def test_a_host_of_another_name_is_not_believed(start, authority: Authority) -> None:  # type: ignore[no-untyped-def]
    certificate, key = authority.issue("elsewhere", names="DNS:elsewhere.example")
    process = start("--listen", "127.0.0.1:0", "--tls-cert", str(certificate), "--tls-key", str(key))
    with (
        SidecarClient(f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}") as client,
        pytest.raises(StoreUnavailable, match=r"IP address mismatch|doesn't match"),
    ):
        client.ping()


def test_clients_have_to_present_a_certificate(start, release, authority, server_options, tmp_path) -> None:  # type: ignore[no-untyped-def]
    process = start(*server_options, "--tls-ca", str(authority.ca))
    address = f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}"
    certificate, key = authority.issue("client")
    with SidecarClient(f"{address}&cert_file={certificate}&key_file={key}") as client:
        check(client, release, release.random_ids(np.random.default_rng(1), 100))
    stranger = Authority(tmp_path / "other").issue("stranger")
    for identity in ("", f"&cert_file={stranger[0]}&key_file={stranger[1]}"):
        with SidecarClient(address + identity) as client, pytest.raises(StoreUnavailable, match="cannot be reached"):
            client.ping()
    no_retry = Retry(NoBackoff(), 0)
    with (
        redis.Redis(
            host="127.0.0.1", port=process.tcp_port, ssl=True, ssl_ca_certs=str(authority.ca), retry=no_retry
        ) as client,
        pytest.raises(redis.ConnectionError),
    ):
        client.ping()


def test_tls_and_password_together(start, authority: Authority, server_options: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "password").write_text("correct horse\n")
    process = start(*server_options, "--password-file", str(tmp_path / "password"))
    address = f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}"
    with SidecarClient(address, password="correct horse") as client:
        client.ping()
    with SidecarClient(address, password="wrong") as client, pytest.raises(Exception, match="WRONGPASS"):
        client.ping()


def test_what_was_asked_is_answered_before_a_connection_ends(start, authority, server_options) -> None:  # type: ignore[no-untyped-def]
    process = start(*server_options)
    context = ssl.create_default_context(cafile=authority.ca)
    with (
        socket.create_connection(("127.0.0.1", process.tcp_port), 20) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as raw,
    ):
        raw.sendall(resp.command(b"PING") * 300 + resp.command(b"QUIT"))
        assert read_all(raw) == b"+PONG\r\n" * 300 + b"+OK\r\n"


def test_garbage_instead_of_a_greeting_harms_nobody(start, authority, server_options) -> None:  # type: ignore[no-untyped-def]
    process = start(*server_options)
    for garbage in (b"PING\r\n" * 100, bytes(5000), b"\x16\x03\x01\xff\xff" + bytes(100)):
        with socket.create_connection(("127.0.0.1", process.tcp_port), 20) as raw:
            raw.sendall(garbage)
            raw.shutdown(socket.SHUT_WR)
            try:
                while raw.recv(1000):
                    pass
            except ConnectionResetError:
                pass
    with SidecarClient(f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}") as client:
        client.ping()
    assert int(process.client().info()["connected_clients"]) <= 2


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--socket", "s", "--tls-cert", "{pem}", "--tls-key", "{key}"), 2, "are for --listen HOST:PORT, which is not"),
        (("--listen", "127.0.0.1:0", "--tls-cert", "{pem}"), 2, "TLS needs both --tls-cert FILE and --tls-key FILE"),
        (("--listen", "127.0.0.1:0", "--tls-ca", "{ca}"), 2, "TLS needs both"),
        (("--listen", "127.0.0.1:0", "--tls-cert", "{pem}", "--tls-key", "/none"), 1, "/none: No such file"),
        (("--listen", "127.0.0.1:0", "--tls-cert", "{pem}", "--tls-key", "{ca}"), 1, "are no PEM certificate and its"),
        (
            ("--listen", "127.0.0.1:0", "--tls-cert", "{pem}", "--tls-key", "{key}", "--tls-ca", "{key}"),
            1,
            "holds no PEM certificate",
        ),
    ],
)
def test_wrong_options(authority: Authority, arguments: tuple[str, ...], code: int, message: str) -> None:
    pem, key = authority.issue("options")
    given = [argument.format(pem=pem, key=key, ca=authority.ca) for argument in arguments]
    result = CliRunner().invoke(cli, ["sidecar", "--store", "memmap:///none", *given])
    assert result.exit_code == code, result.output
    assert message in result.output


def test_wrong_client_addresses(authority: Authority) -> None:
    with pytest.raises(InvalidStoreURL, match="option 'ca'; accepted: ca_file, cert_file, key_file"):
        SidecarClient("tls://host:1?ca=x")
    with pytest.raises(InvalidStoreURL, match="a key_file without its cert_file"):
        SidecarClient(f"tls://host:1?key_file={authority.ca}")
    with pytest.raises(FileNotFoundError, match="/none"):
        SidecarClient("tls://host:1?ca_file=/none")
    with pytest.raises(ValueError, match="are no PEM certificate and its unencrypted key"):
        SidecarClient(f"tls://host:1?cert_file={authority.ca}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_kept_connections_are_replaced_after_a_restart(  # type: ignore[no-untyped-def]
    start, release, authority: Authority, number: signal.Signals
) -> None:
    certificate, key = authority.issue("server")
    options = ("--listen", f"127.0.0.1:{free_port()}", "--tls-cert", str(certificate), "--tls-key", str(key))
    process = start(*options)
    with SidecarClient(f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}") as client:
        check(client, release, {"item": np.arange(5000)})
        process.stop(number)
        start(*options)
        check(client, release, {"item": np.arange(5000)})
