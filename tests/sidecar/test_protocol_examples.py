"""The examples of docs/protocol.md, run as they stand there but for the sidecar's address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
EXAMPLES = dict(re.findall(r"^```python (.+)\n((?:.*\n)+?)```$", DOCUMENT.read_text(), re.MULTILINE))


def run(name: str, sidecar: Any) -> dict[str, Any]:
    """The names that the example leaves behind."""
    source = EXAMPLES[name]
    assert source.count("/run/torchrank.sock") == 1
    code = compile(source.replace("/run/torchrank.sock", str(sidecar.socket)), f"protocol.md, {name}", "exec")
    names: dict[str, Any] = {"__name__": "example"}
    exec(code, names)  # noqa: S102  # our own document
    return names


def test_all_examples_were_read() -> None:
    assert set(EXAMPLES) == {"client", "async client", "redis-py"}
    assert len(EXAMPLES) == DOCUMENT.read_text().count("```python")


def test_the_client_in_ten_lines(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    assert EXAMPLES["client"].strip().count("\n") <= 10
    names = run("client", sidecar)
    np.testing.assert_array_equal(names["vectors"], release.expected("item", np.array([7, -1, 7])).astype(np.float32))
    np.testing.assert_array_equal(names["status"], [0, 1, 0])


def test_the_async_client(sidecar, release) -> None:  # type: ignore[no-untyped-def]
    replies = run("async client", sidecar)["replies"]
    for reply, name in zip(replies, ("item", "user"), strict=True):
        rows = reply.tables[name].rows.view(np.float16)
        np.testing.assert_array_equal(rows, release.expected(name, np.array([0])))


@pytest.mark.parametrize("attempt", [1, 2])  # a connection that was closed is not missed
def test_plain_redis_py(sidecar, release, attempt: int) -> None:  # type: ignore[no-untyped-def]
    names = run("redis-py", sidecar)
    np.testing.assert_array_equal(names["rows"], release.expected("item", np.array([7, -1, 7])))
    np.testing.assert_array_equal(names["status"], [0, 1, 0])
