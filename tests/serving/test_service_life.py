"""The service's start and end, its store's failures, and what it tells about itself: real processes, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from export.bundle import read_manifest
from tests.serving.bundle_factory import TinyModel, blank_request, build_bundle, publish_bundle, random_request
from tests.serving.running import Service, command_line, running_service, running_sidecar
from tests.serving.test_service_rank import check_answer, check_error


def samples(client: httpx.Client) -> dict[str, float]:
    """`name{label="value"}` -> value, of every sample of GET /metrics."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def failing(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_health_and_readiness(client: httpx.Client) -> None:
    health, ready = client.get("/health"), client.get("/ready")
    assert (health.status_code, health.json()) == (200, {"alive": True})
    assert ready.status_code == 200
    assert ready.json() == {"ready": True, "release": "tiny@1", "variant": "fp32", "tasks": ["click", "finish"]}
    assert {answer.headers["x-torchrank-release"] for answer in (health, ready)} == {"tiny@1"}


def test_metrics_count_what_was_asked(client: httpx.Client) -> None:
    before = samples(client)
    for seed in range(3):
        assert client.post("/rank", json=random_request(np.random.default_rng(seed), 10)).status_code == 200
    assert client.post("/rank", json={}).status_code == 400
    after = samples(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert after['torchrank_release{release="tiny@1"}'] == 1
    assert grown('torchrank_requests_total{status="200"}') == 3
    assert grown('torchrank_requests_total{status="400"}') == 1
    assert grown("torchrank_candidates_total{}") == 30
    assert grown("torchrank_absent_ids_total{}") == 0
    assert grown("torchrank_request_seconds_count{}") == 4
    for stage in ("features", "lookup", "graph", "encode"):
        assert grown(f'torchrank_stage_seconds_count{{stage="{stage}"}}') == 3, stage
        assert 0 < grown(f'torchrank_stage_seconds_sum{{stage="{stage}"}}') < 3, stage
    assert after["torchrank_requests_in_flight{}"] == 0
    assert not any(name.startswith(("python_", "process_")) for name in after)


def test_sigterm_ends_it_with_0(folder: Path, model: TinyModel, store_url: str) -> None:
    with running_service(folder / "sigterm.log", model.folder, "--store", store_url, "--variant", "fp16") as service:
        assert httpx.get(f"{service.url}/ready").json()["variant"] == "fp16"
        with httpx.Client() as idle:  # a kept connection must not hold it up
            idle.get(f"{service.url}/health")
            began = time.monotonic()
            assert service.terminate() == 0
        assert time.monotonic() - began < 10
        assert service.process.stdout is not None
        assert service.process.stdout.read() == "torchrank serve: stopped\n"
    assert service.log.read_text() == ""


@pytest.mark.parametrize("what", ["port", "host"])
def test_an_address_that_it_cannot_have(folder: Path, model: TinyModel, store_url: str, what: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1]) if what == "port" else "0"
        host = "127.0.0.1" if what == "port" else "203.0.113.7"
        command = command_line("serve", model.folder, "--store", store_url, "--host", host, "--port", port)
        result = failing(command)
    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: cannot listen on {host}:{port}: ")
    assert result.stderr.count("\n") == 1


def test_two_services_do_not_share_a_port(service: Service, model: TinyModel, store_url: str) -> None:
    command = command_line("serve", model.folder, "--store", store_url, "--port", str(urlsplit(service.url).port))
    result = failing(command)
    assert result.returncode == 1
    assert "Address already in use" in result.stderr


def test_an_unpublished_bundle(tmp_path: Path, store_url: str, model: TinyModel) -> None:
    other = build_bundle(tmp_path / "other", version="2")
    command = command_line("serve", other.folder, "--store", store_url)
    result = failing(command)
    assert result.returncode == 1
    assert f"publish it with: torchrank publish {other.folder} --store" in result.stderr


def test_a_policy_for_a_table_that_the_bundle_has_not(model: TinyModel, store_url: str) -> None:
    policy = ("--on-unavailable", "cache,default", "--on-unavailable", "itm=cache,previous,default")
    result = failing(command_line("serve", model.folder, "--store", store_url, *policy))
    assert result.returncode == 1
    tables = ", ".join(sorted(table.name for table in read_manifest(model.folder).tables))
    message = f"--on-unavailable itm=cache,previous,default: tiny@1 has no table 'itm'; it has: {tables}"
    assert result.stderr == f"Error: {message}\n"


@pytest.mark.parametrize("given", [[], ["--sidecar", "a", "--store", "memmap://b"]], ids=["none", "both"])
def test_one_source_of_rows(model: TinyModel, given: list[str]) -> None:
    result = failing(command_line("serve", model.folder, *given))
    assert result.returncode == 2
    assert "give one of --sidecar ADDRESS and --store URL" in result.stderr


def test_readiness_follows_the_store(tmp_path: Path) -> None:
    """Pages that are mapped stay readable, so ranking goes on; but nobody should start to rely on this host."""
    model = build_bundle(tmp_path / "bundle")
    store = tmp_path / "store"
    publish_bundle(model, f"memmap://{store}")
    with (
        running_service(tmp_path / "log", model.folder, "--store", f"memmap://{store}") as service,
        httpx.Client(base_url=service.url) as client,
    ):
        assert client.get("/ready").status_code == 200
        store.rename(tmp_path / "elsewhere")
        check_error(client.get("/ready"), 503, None, "cannot be reached")
        assert client.get("/health").status_code == 200
        (tmp_path / "elsewhere").rename(store)
        assert client.get("/ready").status_code == 200


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A real redis-server on a unix socket, and its URL."""
    binary = shutil.which("redis-server")
    assert binary is not None, "redis-server is not installed: apt-get install redis-server"
    path = tmp_path / "redis.sock"
    process = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", path, "--save", "", "--dir", tmp_path], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)
        yield process, f"redis+unix://{path}"
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        process.wait()


Redis = tuple[subprocess.Popen[bytes], str]


def test_a_store_that_dies_is_503(tmp_path: Path, redis_server: Redis) -> None:
    redis, url = redis_server
    model = build_bundle(tmp_path / "bundle", codec="fp16")
    publish_bundle(model, url)
    request = random_request(np.random.default_rng(5), 30)
    options = ("--store", url, "--cache-size", "0", "--timeout-ms", "5000")
    with (
        running_service(tmp_path / "log", model.folder, *options) as service,
        httpx.Client(base_url=service.url, timeout=30) as client,
    ):
        check_answer(model, request, client.post("/rank", json=request))
        redis.kill()
        redis.wait()
        check_error(client.post("/rank", json=request), 503, None, "embedding store: ")
        check_error(client.get("/ready"), 503, None, "embedding store: ")
        assert client.get("/health").status_code == 200
        assert samples(client)['torchrank_requests_total{status="503"}'] == 1
        assert service.terminate() == 0


def test_a_sidecar_that_dies_and_comes_back(tmp_path: Path, model: TinyModel, store_url: str) -> None:
    socket_path = tmp_path / "sidecar.sock"
    request = random_request(np.random.default_rng(8), 30)
    with ExitStack() as running:
        sidecar = running.enter_context(running_sidecar(tmp_path / "sidecar.log", store_url, socket_path))
        service = running.enter_context(running_service(tmp_path / "log", model.folder, "--sidecar", socket_path))
        client = running.enter_context(httpx.Client(base_url=service.url, timeout=30))
        check_answer(model, request, client.post("/rank", json=request))
        assert client.get("/ready").status_code == 200
        sidecar.kill()
        sidecar.wait()
        check_error(client.post("/rank", json=request), 503, None, str(socket_path))
        check_error(client.get("/ready"), 503, None, "cannot be reached")
        running.enter_context(running_sidecar(tmp_path / "second.log", store_url, socket_path))
        check_answer(model, request, client.post("/rank", json=request))
        assert client.get("/ready").status_code == 200
        assert service.terminate() == 0


def test_a_sidecar_with_a_password(tmp_path: Path, model: TinyModel, store_url: str) -> None:
    socket_path, right, wrong = tmp_path / "sidecar.sock", tmp_path / "right", tmp_path / "wrong"
    right.write_text("correct horse\n")
    wrong.write_text("battery staple\n")
    request = random_request(np.random.default_rng(9), 30)
    serve = (model.folder, "--sidecar", socket_path)
    with running_sidecar(tmp_path / "sidecar.log", store_url, socket_path, "--password-file", right):
        without = failing(command_line("serve", *serve))
        assert (without.returncode, without.stderr) == (
            1, f"Error: unix://{socket_path}: NOAUTH Authentication required.\n"
        )  # fmt: skip
        refused = failing(command_line("serve", *serve, "--sidecar-password-file", wrong))
        assert (refused.returncode, refused.stderr) == (
            1, f"Error: unix://{socket_path}: WRONGPASS invalid password\n"
        )  # fmt: skip
        with running_service(tmp_path / "log", *serve, "--sidecar-password-file", right) as service:
            check_answer(model, request, httpx.post(f"{service.url}/rank", json=request, timeout=30))
            assert "correct horse" not in Path(f"/proc/{service.process.pid}/cmdline").read_text()


def test_the_deadline_reaches_a_store_that_hangs(tmp_path: Path, redis_server: Redis) -> None:
    redis, url = redis_server
    model = build_bundle(tmp_path / "bundle")
    publish_bundle(model, url)
    request = random_request(np.random.default_rng(6), 30)
    options = ("--store", url, "--cache-size", "0", "--timeout-ms", "400", "--concurrency", "1")
    with (
        running_service(tmp_path / "log", model.folder, *options) as service,
        httpx.Client(base_url=service.url, timeout=30) as client,
    ):
        redis.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with ThreadPoolExecutor(2) as pool:  # the second waits for the only ranking thread, until its time is over
            answers = list(pool.map(lambda _: client.post("/rank", json=request), range(2)))
        assert 0.3 < time.monotonic() - began < 5
        assert {answer.status_code for answer in answers} <= {503, 504}
        redis.send_signal(signal.SIGCONT)
        check_answer(model, request, client.post("/rank", json=request))


def test_sigterm_lets_requests_in_flight_finish(tmp_path: Path, redis_server: Redis) -> None:
    redis, url = redis_server
    model = build_bundle(tmp_path / "bundle")
    publish_bundle(model, url)
    request = random_request(np.random.default_rng(7), 30)
    options = ("--store", url, "--cache-size", "0", "--timeout-ms", "20000")
    with (
        running_service(tmp_path / "log", model.folder, *options) as service,
        httpx.Client(base_url=service.url) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        redis.send_signal(signal.SIGSTOP)
        answer = pool.submit(httpx.post, f"{service.url}/rank", json=request, timeout=30)
        while samples(client)["torchrank_requests_in_flight{}"] == 0:
            time.sleep(0.02)
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{service.url}/health")
        redis.send_signal(signal.SIGCONT)
        check_answer(model, request, answer.result())
        assert service.process.wait(30) == 0


def test_the_golden_request_of_the_bundle(client: httpx.Client, model: TinyModel) -> None:
    """What the bundle promises is what HTTP answers."""
    golden = json.loads((model.folder / "golden.jsonl").read_text().splitlines()[0])
    scores = golden.pop("scores")
    body = client.post("/rank", json=golden).json()
    for task, expected in scores.items():
        np.testing.assert_allclose(body["scores"][task], expected, atol=1e-5)


def test_unknown_columns_are_ignored(client: httpx.Client) -> None:
    """A caller may send more than this model reads."""
    assert client.post("/rank", json=blank_request({"colour": "red"})).status_code == 200
