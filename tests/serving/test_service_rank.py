"""POST /rank of the real process, over HTTP."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serving.bundle_factory import TASKS, TinyModel, blank_request, random_request

RELEASE = "tiny@1"


def check_answer(model: TinyModel, request: dict[str, Any], answer: httpx.Response, order_by: str = "click") -> None:
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-torchrank-release"] == RELEASE
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"release", "scores", "order", "absent", "unavailable", "stale"}
    assert body["release"] == RELEASE
    assert list(body["scores"]) == list(TASKS)
    for task, expected in model.expected(request["user"], request["context"], request["candidates"]).items():
        np.testing.assert_allclose(body["scores"][task], expected, atol=1e-5, err_msg=task)
    assert sorted(body["order"]) == list(range(len(request["candidates"])))
    ranked = np.array(body["scores"][order_by])[body["order"]]
    assert (np.diff(ranked) <= 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_model_computed_from_raw_values(client: httpx.Client, model: TinyModel, seed: int) -> None:
    request = random_request(np.random.default_rng(seed), 1 + 40 * seed)
    check_answer(model, request, client.post("/rank", json=request))


def test_order_by_another_task(client: httpx.Client, model: TinyModel) -> None:
    request = random_request(np.random.default_rng(11), 60)
    answer = client.post("/rank", json=request | {"order_by": "finish"})
    check_answer(model, request, answer, order_by="finish")
    assert answer.json()["order"] != client.post("/rank", json=request).json()["order"]


def test_equal_scores_keep_the_order_of_the_request(client: httpx.Client) -> None:
    request = blank_request(*({"item_id": i} for i in (7, 3, 7, 3, 7)))
    body = client.post("/rank", json=request).json()
    first, second = (
        ([0, 2, 4], [1, 3]) if body["scores"]["click"][0] > body["scores"]["click"][1] else ([1, 3], [0, 2, 4])
    )
    assert body["order"] == first + second


def test_concurrent_requests_get_their_own_answers(client: httpx.Client, model: TinyModel) -> None:
    requests = [random_request(np.random.default_rng(100 + seed), 5 + 7 * seed) for seed in range(32)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: client.post("/rank", json=request), requests))
    for request, answer in zip(requests, answers, strict=True):
        check_answer(model, request, answer)


def with_candidate(**values: Any) -> dict[str, Any]:
    return blank_request(*({"item_id": i} for i in range(3)), values)


def without(side: str, name: str) -> dict[str, Any]:
    request = blank_request({}, {})
    where = request["candidates"][1] if side == "candidates[1]" else request[side]
    del where[name]
    return request


WRONG = [
    (with_candidate(price="cheap"), "candidates[3].price", "found str 'cheap'"),
    (with_candidate(item_id=1.5), "candidates[3].item_id", "found float 1.5"),
    (with_candidate(item_id=2**70), "candidates[3].item_id", "64 bits"),
    (with_candidate(category=3), "candidates[3].category", "accepted: a string"),
    (with_candidate(tags="one"), "candidates[3].tags", "a list of string"),
    (with_candidate(tags=["a", 5]), "candidates[3].tags[1]", "found int 5"),
    (blank_request({}) | {"user": {"age": 3}}, "user.user_id", "missing"),
    (without("user", "age"), "user.age", "missing"),
    (without("context", "hour"), "context.hour", "missing"),
    (without("candidates[1]", "author"), "candidates[1].author", "missing"),
    (blank_request({}) | {"context": []}, "context", "Expected `object`, got `array`"),
    (blank_request({}) | {"candidates": {}}, "candidates", "Expected `array`, got `object`"),
    (blank_request({}) | {"candidates": [{}, 3]}, "candidates[1]", "Expected `object`, got `int`"),
    (blank_request(), "candidates", "found 0, accepted are 1 to 600"),
    (blank_request(*[{}] * 601), "candidates", "found 601, accepted are 1 to 600"),
    (blank_request({}) | {"order_by": "buy"}, "order_by", "no task 'buy'; the tasks are: click, finish"),
    (blank_request({}) | {"order": "click"}, "order", "unknown field; fields of a request are:"),
    ({"user": {}, "context": {}}, "candidates", "required field is missing"),
]


@pytest.mark.parametrize(("request_body", "field", "message"), WRONG, ids=[f"{w[1]}-{i}" for i, w in enumerate(WRONG)])
def test_a_wrong_field_is_named(client: httpx.Client, request_body: dict[str, Any], field: str, message: str) -> None:
    check_error(client.post("/rank", content=json.dumps(request_body)), 400, field, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b'{"candidates": [', "truncated"),
        (b"price=3", "JSON is malformed: invalid character (byte 0)"),
        (b'{"candidates": [{"item_id": NaN}]}', "JSON is malformed"),
        (b'{"candidates": [{"category": "\xff"}]}', "utf-8"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"user": ' + b"[" * 100_000, "got `array`"),
        (b'{"candidates": [{"tags": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_json(client: httpx.Client, content: bytes, message: str) -> None:
    field = "user" if content.startswith(b'{"user"') else "body"
    check_error(client.post("/rank", content=content), 400, field, message)


def test_a_body_over_the_limit(client: httpx.Client) -> None:
    check_error(client.post("/rank", content=b" " * (2 << 20)), 413, None, "Too Large")


def test_the_limit_holds_without_content_length(client: httpx.Client) -> None:
    check_error(client.post("/rank", content=(b" " * 65536 for _ in range(32))), 413, None, "Too Large")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/rank", 405), ("GET", "/nowhere", 404)])
def test_other_errors_carry_the_release_too(client: httpx.Client, method: str, path: str, status: int) -> None:
    check_error(client.request(method, path), status, None, "Not")


def check_error(answer: httpx.Response, status: int, field: str | None, message: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-torchrank-release"] == RELEASE
    body = answer.json()
    assert body["release"] == RELEASE
    assert body.get("field") == field, body
    assert message in body["error"]
    if field is not None:
        assert body["error"].startswith(f"{field}: ")
