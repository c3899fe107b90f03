"""The sdist, the wheel built from it, and that wheel at work in an environment without torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.serving.bundle_factory import build_bundle

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that must succeed, run as from a shell that knows nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel made from that sdist."""
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, ROOT, cwd=output)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def serving_host(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel and requirements/serve.txt, and no more."""
    environment = tmp_path_factory.mktemp("host") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python")
    lock = ROOT / "requirements/serve.txt"
    run(*pip, "install", "-qq", "--no-deps", "-r", lock, distributions[1], cwd=environment.parent)
    run(*pip, "check", cwd=environment.parent)
    return environment / "bin"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_the_sdist_has_what_a_build_and_a_test_run_need(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "scripts/setup", "scripts/test", "requirements/cpu.txt"} <= names
    assert {
        "torchrank/cli.py",
        "embedding_store/lookup.py",
        "export/bundle.py",
        "tests/packaging/test_wheel.py",
    } <= names
    assert {f"conf/{name}" for name in files(ROOT / "conf")} <= names


def test_the_wheel_has_the_packages_and_conf(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {f"torchrank/conf/{name}" for name in files(ROOT / "conf")} <= names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"torchrank", "embedding_store", "export"}
    assert "License-Expression: Apache-2.0" in metadata
    assert {"Provides-Extra: train", "Provides-Extra: serve", "Provides-Extra: dev"} <= set(metadata.splitlines())


def test_an_installed_wheel_finds_its_own_conf(serving_host: Path, tmp_path: Path) -> None:
    program = "from torchrank.config_dir import config_dir; print(config_dir())"
    found = Path(run(serving_host / "python", "-c", program, cwd=tmp_path).strip())
    assert found.is_relative_to(serving_host.parent)
    assert files(found) == files(ROOT / "conf")


def test_a_serving_host_has_no_torch_and_answers_help(serving_host: Path, tmp_path: Path) -> None:
    absent = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, sys.argv[1:])))"
    run(serving_host / "python", "-c", absent, "torch", "torchrec", "hydra", "pyarrow", cwd=tmp_path)
    for command in [[], ["publish"], ["sidecar"], ["serve"]]:
        assert run(serving_host / "torchrank", *command, "--help", cwd=tmp_path).startswith("Usage: torchrank ")


@contextmanager
def serving(*command: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A server that must end by itself, with status 0, on SIGTERM."""
    log = cwd / "server.log"
    with (
        log.open("a") as output,
        subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, text=True) as process,
    ):
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()


def until_it_accepts(address: Path | int, server: subprocess.Popen[str], log: Path) -> socket.socket:
    """A connection to a unix socket or a local port, once `server` listens there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
        connection = socket.socket(family)
        try:
            connection.connect(str(address) if isinstance(address, Path) else ("127.0.0.1", address))
        except OSError:
            connection.close()
            time.sleep(0.05)
        else:
            connection.settimeout(30)
            return connection
    raise AssertionError(f"{address}: nobody listens\n{log.read_text()}")


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        return int(probe.getsockname()[1])


def test_publish_sidecar_and_service_run_from_the_wheel(serving_host: Path, tmp_path: Path) -> None:
    model = build_bundle(tmp_path / "bundle", golden=3)
    torchrank, store = serving_host / "torchrank", f"memmap://{tmp_path / 'store'}"
    run(torchrank, "publish", model.folder, "--store", store, "--activate", cwd=tmp_path)

    address, port, log = tmp_path / "sidecar.sock", free_port(), tmp_path / "server.log"
    with serving(torchrank, "sidecar", "--store", store, "--socket", address, cwd=tmp_path) as sidecar:
        with until_it_accepts(address, sidecar, log) as connection:
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
            assert connection.recv(64) == b"+PONG\r\n"
        command = [torchrank, "serve", model.folder, "--sidecar", address, "--port", str(port)]
        with serving(*command, cwd=tmp_path) as service:
            until_it_accepts(port, service, log).close()
            for line in (model.folder / "golden.jsonl").read_bytes().splitlines():
                golden = msgspec.json.decode(line)
                request = {name: golden[name] for name in ("user", "context", "candidates")}
                answer = httpx.post(f"http://127.0.0.1:{port}/rank", json=request, timeout=30)
                assert answer.status_code == 200, answer.text
                expected = model.expected(**request)
                scores = answer.json()["scores"]
                assert set(scores) == set(expected)
                for task, values in expected.items():
                    assert scores[task] == pytest.approx(values, abs=5e-3)  # --variant auto may take fp16
