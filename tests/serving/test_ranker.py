"""The ranker without HTTP, and what HTTP makes of a failure that is nobody's request."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from embedding_store.codec import encode
from embedding_store.memory import MemoryStore
from embedding_store.release import ReleaseManifest
from export.session import Scorer
from tests.serving.bundle_factory import TASKS, TinyModel, blank_request, build_bundle, random_request
from torchrank.features.transform import FeatureTransform
from torchrank.serving.app import Service, build_app
from torchrank.serving.messages import BadRequest, RankRequest
from torchrank.serving.metrics import ServiceMetrics
from torchrank.serving.ranker import DeadlineExceeded, NonFiniteScores, Ranker


@pytest.fixture
def model(tmp_path: Path) -> TinyModel:
    return build_bundle(tmp_path / "bundle")


@pytest.fixture
def stages() -> list[tuple[str, float]]:
    return []


@pytest.fixture
def ranker(model: TinyModel, stages: list[tuple[str, float]]) -> Ranker:
    """Item 13 has a broken row."""
    store = MemoryStore()
    tables = {t.name: encode(t.codec, model.tables[t.name]).copy() for t in model.manifest.tables}
    tables["item_id"][13] = 0xFF  # NaN, as float32
    store.add(ReleaseManifest("tiny", "1", "", model.manifest.tables), tables)
    transform = FeatureTransform(model.manifest.features)
    return Ranker(Scorer(model.folder, store), transform, observe=lambda *stage: stages.append(stage))


def test_ranks_without_a_server(model: TinyModel, ranker: Ranker, stages: list[tuple[str, float]]) -> None:
    raw = random_request(np.random.default_rng(4), 25)
    raw["candidates"] = [item | {"item_id": 20 + i} for i, item in enumerate(raw["candidates"])]
    raw["user"]["recent_items"] = [1, 2]
    response = ranker.rank(RankRequest(**raw, order_by="finish"), timeout=5.0)
    expected = model.expected(**raw)
    for task in TASKS:
        np.testing.assert_allclose(response.scores[task], expected[task], atol=1e-5)
    assert response.order == sorted(range(25), key=lambda i: -response.scores["finish"][i])
    assert (response.release, response.absent) == ("tiny@1", 0)
    assert [stage for stage, _ in stages] == ["features", "lookup", "graph"]
    assert all(seconds > 0 for _, seconds in stages)


def test_time_that_is_over_is_not_spent_on_the_store(ranker: Ranker, stages: list[tuple[str, float]]) -> None:
    with pytest.raises(DeadlineExceeded, match="no time left for the look-up"):
        ranker.rank(RankRequest(**blank_request({"item_id": 1})), timeout=1e-9)
    assert [stage for stage, _ in stages] == ["features"]


def test_a_score_that_is_not_a_number_is_an_error(ranker: Ranker) -> None:
    request = RankRequest(**blank_request({"item_id": 12}, {"item_id": 13}))
    with pytest.raises(NonFiniteScores, match=r"task 'click': the score of candidates\[1\] is nan"):
        ranker.rank(request)


def test_an_unknown_task(ranker: Ranker) -> None:
    with pytest.raises(BadRequest, match="order_by: no task 'buy'; the tasks are: click, finish"):
        ranker.rank(RankRequest(**blank_request({}), order_by="buy"))


def test_an_internal_error_is_logged_not_shown(ranker: Ranker, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(1) as executor:
        metrics = ServiceMetrics(ranker.release)
        app = build_app(Service(ranker, metrics, executor), max_body_bytes=1 << 20)
        answer = asyncio.run(_post(app, blank_request({"item_id": 13})))
    assert answer.status_code == 500
    assert answer.headers["x-torchrank-release"] == "tiny@1"
    assert answer.json() == {"release": "tiny@1", "error": "internal error; the service's log has it"}
    record = next(r for r in caplog.records if r.name == "torchrank.serving")
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], NonFiniteScores)
    assert b'torchrank_requests_total{status="500"} 1.0' in metrics.exposition()


def test_a_service_that_drains_is_not_ready(ranker: Ranker) -> None:
    with ThreadPoolExecutor(1) as executor:
        service = Service(ranker, ServiceMetrics(ranker.release), executor)
        app = build_app(service, max_body_bytes=1 << 20)
        assert asyncio.run(_get(app, "/ready")).status_code == 200
        service.drain()
        answer = asyncio.run(_get(app, "/ready"))
    assert (answer.status_code, answer.json()["error"]) == (503, "the service is shutting down")


async def _post(app: object, body: dict) -> httpx.Response:
    async with _client(app) as client:
        return await client.post("/rank", json=body)


async def _get(app: object, path: str) -> httpx.Response:
    async with _client(app) as client:
        return await client.get(path)


def _client(app: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]  # httpx has its own name for the same protocol
    return httpx.AsyncClient(transport=transport, base_url="http://service")
