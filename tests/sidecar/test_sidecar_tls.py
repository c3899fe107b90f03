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
from tests.sidecar.test_sidecar_client import check, until
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


class Rotated:
    """Files of a sidecar's listener that are replaced while it runs."""

    def __init__(self, folder: Path) -> None:
        self.certificate, self.key, self.ca = folder / "its.pem", folder / "its.key", folder / "its-ca.pem"

    def replace(self, authority: Authority, name: str = "server") -> None:
        """One after the other, as most tools do it."""
        for source, target in zip(authority.issue(name), (self.certificate, self.key), strict=True):
            target.write_bytes(source.read_bytes())

    @property
    def options(self) -> list[str]:
        return ["--listen", "127.0.0.1:0", "--tls-cert", str(self.certificate), "--tls-key", str(self.key)]


def answers(address: str) -> bool:
    with SidecarClient(address, timeout=5) as client:
        try:
            client.ping()
        except StoreUnavailable:
            return False
        return True


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])  # without a name in the greeting, and with one
def test_a_new_certificate_is_for_new_connections(start, authority, tmp_path: Path, host: str) -> None:  # type: ignore[no-untyped-def]
    files, other = Rotated(tmp_path), Authority(tmp_path / "other")
    names = "IP:127.0.0.1,DNS:localhost"
    for source, target in zip(authority.issue("first", names=names), (files.certificate, files.key), strict=True):
        target.write_bytes(source.read_bytes())
    process = start(*files.options, "--poll-seconds", "0.05")
    before, after = (f"tls://{host}:{process.tcp_port}?ca_file={one.ca}" for one in (authority, other))
    assert (answers(before), answers(after)) == (True, False)
    with SidecarClient(before, connections=1) as kept:
        kept.ping()
        for source, target in zip(other.issue("second", names=names), (files.certificate, files.key), strict=True):
            target.write_bytes(source.read_bytes())
        until(lambda: answers(after), "the new certificate is shown")
        assert not answers(before)
        kept.ping()  # on the connection that it has
    assert process.stop()[0] == 0


def test_files_that_are_of_no_use_are_told_and_left(start, authority, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files = Rotated(tmp_path)
    files.replace(authority)
    process = start(*files.options, "--poll-seconds", "0.05")
    address = f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}"
    told = []

    def read_until(text: str) -> None:
        while text not in "".join(told[-1:]):
            told.append(process.process.stderr.readline())
            assert told[-1]

    files.certificate.write_text("nothing of use")
    read_until(f"cannot be used, those before stay in use: {files.certificate} and {files.key} are no PEM")
    assert answers(address)
    files.key.unlink()
    read_until("cannot be used, those before stay in use: [Errno 2] No such file or directory")
    assert answers(address)
    files.replace(authority, "another")
    read_until("new connections get the TLS certificate that was read just now")
    assert answers(address)


def test_new_authorities_are_for_new_connections(start, authority, server_options, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    files, other = Rotated(tmp_path), Authority(tmp_path / "other")
    files.ca.write_bytes(authority.ca.read_bytes())
    process = start(*server_options, "--tls-ca", str(files.ca), "--poll-seconds", "0.05")
    old, new = (
        f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}&cert_file={certificate}&key_file={key}"
        for certificate, key in (authority.issue("client"), other.issue("client"))
    )
    assert (answers(old), answers(new)) == (True, False)
    files.ca.write_bytes(other.ca.read_bytes())
    until(lambda: answers(new), "the new authority is trusted")
    assert not answers(old)


def test_no_session_outlives_the_authority_that_began_it(start, authority, server_options, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A client that goes on with a session is not asked for its certificate again."""
    files, other = Rotated(tmp_path), Authority(tmp_path / "other")
    files.ca.write_bytes(authority.ca.read_bytes())
    process = start(*server_options, "--tls-ca", str(files.ca), "--poll-seconds", "0.05")
    context = ssl.create_default_context(cafile=authority.ca)
    context.load_cert_chain(*authority.issue("client"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # of the later one, alerts come after the greeting

    def greet(session: ssl.SSLSession | None) -> ssl.SSLSession | None:
        with (
            socket.create_connection(("127.0.0.1", process.tcp_port), 20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1", session=session) as raw,
        ):
            raw.sendall(resp.command(b"PING"))
            assert raw.recv(100) == b"+PONG\r\n"
            assert raw.session_reused == (session is not None)
            return raw.session

    session = greet(None)
    greet(session)
    files.ca.write_bytes(other.ca.read_bytes())
    new = "&".join(f"{kind}_file={file}" for kind, file in zip(("cert", "key"), other.issue("client"), strict=True))
    until(lambda: answers(f"tls://127.0.0.1:{process.tcp_port}?ca_file={authority.ca}&{new}"), "the new authority")
    with pytest.raises(OSError):  # noqa: PT011  # an alert or the connection's end, as it comes
        greet(session)
