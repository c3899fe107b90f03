"""The HTTP face of a Ranker.

    POST /rank     RankRequest → RankResponse
    GET  /health   the process is alive
    GET  /ready    the graph is loaded and the store answers: else 503
    GET  /metrics  Prometheus text

Every answer carries the release in the header `X-Torchrank-Release`; every answer that is not 2xx is an ErrorBody.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import msgspec
from litestar import Litestar, Request, Response, get, post
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from embedding_store.errors import StoreError
from torchrank.features.errors import FeatureError
from torchrank.serving.messages import BadRequest, ErrorBody, decode_request
from torchrank.serving.metrics import ServiceMetrics
from torchrank.serving.ranker import DeadlineExceeded, Ranker

logger = logging.getLogger("torchrank.serving")
AnyRequest = Request[Any, Any, Any]


@dataclass(slots=True)
class Service:
    """What the handlers share. `executor` ranks: as many threads as requests are to be ranked at a time."""

    ranker: Ranker
    metrics: ServiceMetrics
    executor: Executor
    timeout: float | None = None  # seconds a request may take, waiting included
    draining: bool = False  # set when the process was asked to end: not ready any more

    def drain(self) -> None:
        self.draining = True

    def answer(self, body: bytes, arrived: float) -> bytes:
        """Runs in a ranking thread. Raises what Ranker.rank raises."""
        started = time.monotonic()
        left = None if self.timeout is None else self.timeout - (started - arrived)
        if left is not None and left <= 0:
            raise DeadlineExceeded(f"waited {(started - arrived) * 1e3:.0f} ms for its turn: too many requests")
        request = decode_request(body)
        decoded = time.monotonic()
        self.metrics.observe_stage("decode", decoded - started)
        response = self.ranker.rank(request, timeout=None if left is None else left - (decoded - started))
        self.metrics.observe_scores(len(request.candidates), response)
        ranked = time.monotonic()
        content = msgspec.json.encode(response)
        self.metrics.observe_stage("encode", time.monotonic() - ranked)
        return content


def build_app(service: Service, *, max_body_bytes: int) -> ASGIApp:
    """`max_body_bytes`: larger bodies of POST /rank are answered 413, without being read to their end."""
    handlers = Litestar(
        route_handlers=[_rank, _health, _ready, _metrics],
        exception_handlers={
            BadRequest: _bad_request,
            FeatureError: _bad_request,
            DeadlineExceeded: _deadline_exceeded,
            StoreError: _store_failed,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
        request_max_body_size=max_body_bytes,
        openapi_config=None,
        logging_config=None,
    )
    handlers.state.service = service
    return _observed(handlers, service)


@post("/rank", status_code=200)
async def _rank(request: AnyRequest) -> Response[bytes]:
    service: Service = request.app.state.service
    arrived = time.monotonic()
    body = await request.body()
    loop = asyncio.get_running_loop()
    return _json(await loop.run_in_executor(service.executor, service.answer, body, arrived), 200)


@get("/health", sync_to_thread=False)
def _health() -> Response[bytes]:
    return _json(b'{"alive":true}', 200)


@get("/ready")
async def _ready(request: AnyRequest) -> Response[bytes]:
    service: Service = request.app.state.service
    if service.draining:
        return _error(request, 503, "the service is shutting down")
    scorer = service.ranker.scorer
    await asyncio.to_thread(scorer.check_reachable)
    body = {"ready": True, "release": scorer.release, "variant": scorer.variant, "tasks": service.ranker.tasks}
    return _json(msgspec.json.encode(body), 200)


@get("/metrics", sync_to_thread=False)
def _metrics(request: AnyRequest) -> Response[bytes]:
    metrics: ServiceMetrics = request.app.state.service.metrics
    return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _bad_request(request: AnyRequest, error: BadRequest | FeatureError) -> Response[bytes]:
    return _error(request, 400, str(error), error.field)


def _deadline_exceeded(request: AnyRequest, error: DeadlineExceeded) -> Response[bytes]:
    return _error(request, 504, str(error))


def _store_failed(request: AnyRequest, error: StoreError) -> Response[bytes]:
    logger.warning("embedding store: %s", error)
    return _error(request, 503, f"embedding store: {error}")


def _http_error(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    answer = _error(request, error.status_code, error.detail)
    if error.status_code == 413:  # what is left of the body is not read: the connection is good for nothing more
        answer.set_header("Connection", "close")
    return answer


def _internal_error(request: AnyRequest, error: Exception) -> Response[bytes]:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(request, 500, "internal error; the service's log has it")


def _error(request: AnyRequest, status: int, message: str, field: str | None = None) -> Response[bytes]:
    service: Service = request.app.state.service
    return _json(msgspec.json.encode(ErrorBody(service.ranker.release, message, field)), status)


def _json(content: bytes, status: int) -> Response[bytes]:
    return Response(content, status_code=status, media_type="application/json")


def _observed(app: ASGIApp, service: Service) -> ASGIApp:
    """Around everything, litestar's own answers (404, 405, 413) included: the release header, and the counts."""
    header = (b"x-torchrank-release", service.ranker.release.encode())
    metrics = service.metrics

    async def observed(scope: Scope, receive: Receive, send: Send) -> None:
        status = 500  # stays where the connection breaks before an answer

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        if scope["type"] != "http" or scope["path"] != "/rank":
            await app(scope, receive, send_named)
            return
        started = time.monotonic()
        with metrics.in_flight.track_inprogress():
            try:
                await app(scope, receive, send_named)
            finally:
                metrics.observe_request(status, time.monotonic() - started)

    return observed
