"""The bodies of `POST /rank`, and the error that names the field which is wrong."""

from __future__ import annotations

import re
from typing import Any

import msgspec


class RankRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Raw values under the names of the feature spec's columns; `order_by` is a task, the first one when absent."""

    candidates: list[dict[str, Any]]
    user: dict[str, Any] = {}
    context: dict[str, Any] = {}
    order_by: str | None = None


class RankResponse(msgspec.Struct, frozen=True):
    """`scores`: per task one probability per candidate, in the request's order; `order`: candidate indices, best first.

    `absent` counts the request's ids that their table has no row for; those were scored with the table's default row.
    The rows of the ids that `unavailable` and `stale` count could not be fetched: a default row, or the row of an
    earlier release, stood in. Both are 0 unless the store's policy allows that.
    """

    release: str
    scores: dict[str, list[float]]
    order: list[int]
    absent: int
    unavailable: int = 0
    stale: int = 0


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """Every answer that is not 2xx. `field` is there when one field of the request is to blame."""

    release: str
    error: str
    field: str | None = None


class BadRequest(ValueError):
    """A request that the service does not accept, with the field that is wrong (`body`: the JSON itself)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


_decoder = msgspec.json.Decoder(RankRequest)
_PLACE = re.compile(r"(?s)(?P<message>.*?)(?: - at `\$\.?(?P<path>.*)`)?\Z")
_NAMED = re.compile(r"Object (missing required|contains unknown) field `(?P<name>.*?)`")


def decode_request(body: bytes) -> RankRequest:
    """Raises BadRequest."""
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _located(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest("body", str(error)) from None
    except RecursionError:
        raise BadRequest("body", "JSON is nested too deeply") from None


def _located(message: str) -> BadRequest:
    """msgspec says "Expected `object`, got `int` - at `$.candidates[3]`" and "Object missing required field `x`"."""
    match = _PLACE.match(message)
    assert match is not None  # the pattern accepts every string
    path, text = (match["path"] or "").replace("[...]", ".*"), match["message"]  # [...]: some key of a mapping
    named = _NAMED.search(text)
    if named is None:
        return BadRequest(path or "body", text)
    accepted = ", ".join(RankRequest.__struct_fields__)
    if named[1] == "missing required":
        return BadRequest(named["name"], "required field is missing")
    return BadRequest(named["name"], f"unknown field; fields of a request are: {accepted}")
