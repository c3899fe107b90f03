"""The synthetic feed's columns: one row per candidate, the candidates of a request together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from torchrank.data.feed_days import Outcomes
from torchrank.data.feed_world import CATEGORIES, CITIES, DEVICES, GENDERS, NETWORKS, TAGS_PER_CATEGORY, Ints, World

ROW_GROUP = 32_768
_UNKNOWN_AGE, _UNKNOWN_CITY = 0.03, 0.04


class FeedTables:
    """Turns days into record batches. Names are strings; some ages and cities are missing, as they are in life."""

    def __init__(self, world: World, generator: np.random.Generator) -> None:
        users, items = world.users, world.items
        self._user = {
            "user_id": _names("u", np.arange(len(users.age))),
            "age": pa.array(users.age, mask=generator.random(len(users.age)) < _UNKNOWN_AGE),
            "gender": pa.array(GENDERS).take(pa.array(users.gender)),
            "city": pa.array(CITIES).take(pa.array(users.city, mask=generator.random(len(users.city)) < _UNKNOWN_CITY)),
            "device": pa.array(DEVICES).take(pa.array(users.device)),
        }
        self._item = {
            "item_id": _names("v", np.arange(len(items.author))),
            "category": pa.array(CATEGORIES).take(pa.array(items.category)),
            "tags": _tags(items.tags),
            "author": _names("a", items.author),
            "duration": pa.array(items.duration),
        }

    def batches(self, outcomes: Outcomes, weekday: int, midnight: int, first_request: int) -> Iterator[pa.RecordBatch]:
        """The day's rows in batches of about ROW_GROUP, cut between requests. `midnight`: Unix seconds;
        request ids count up from `first_request`."""
        per_request = outcomes.shown.sum(axis=1)
        ends = np.cumsum(per_request)
        cuts = np.searchsorted(ends, np.arange(ROW_GROUP, int(ends[-1]), ROW_GROUP))
        for part in np.split(np.arange(len(per_request)), cuts):
            if len(part):
                yield self._batch(outcomes, part, weekday, midnight, first_request)

    def _batch(self, outcomes: Outcomes, part: Ints, weekday: int, midnight: int, first_request: int) -> pa.RecordBatch:
        """`part`: int64 [R], which requests."""
        requests = outcomes.requests
        shown = outcomes.shown[part]
        request = np.repeat(part, shown.sum(axis=1))  # [rows]
        item = pa.array(requests.candidates[part][shown])
        user = pa.array(requests.user[request])
        columns = {
            "request_id": pa.array(first_request + request),
            **{name: values.take(user) for name, values in self._user.items()},
            **self._history(outcomes, request),
            "hour": pa.array(requests.hour[request]),
            "weekday": pa.array(np.full(len(request), weekday)),
            "network": pa.array(NETWORKS).take(pa.array(requests.network[request])),
            "timestamp": pa.array(midnight + outcomes.second[request]),
            **{name: values.take(item) for name, values in self._item.items()},
            "click": pa.array(outcomes.clicked[part][shown].astype(np.int8)),
            "finish": pa.array(outcomes.finished[part][shown].astype(np.int8)),
            "p_click": pa.array(outcomes.p_click[part][shown]),
            "p_finish": pa.array(outcomes.p_finish[part][shown]),
        }
        return pa.record_batch(columns)

    def _history(self, outcomes: Outcomes, request: Ints) -> dict[str, pa.Array]:
        requests = outcomes.requests
        length = requests.history_length[request]
        known = np.arange(requests.history_item.shape[1]) < length[:, None]
        offsets = pa.array(np.concatenate([[0], np.cumsum(length)]).astype(np.int32))
        item = pa.array(requests.history_item[request][known])
        return {
            "history_item": pa.ListArray.from_arrays(offsets, self._item["item_id"].take(item)),
            "history_category": pa.ListArray.from_arrays(offsets, self._item["category"].take(item)),
            "history_watch": pa.ListArray.from_arrays(offsets, pa.array(requests.history_watch[request][known])),
        }


def _names(prefix: str, numbers: NDArray[np.int64]) -> pa.Array:
    return pa.array([f"{prefix}{number:06d}" for number in numbers.tolist()], pa.string())


def _tags(tags: Ints) -> pa.Array:
    names = pa.array([f"{category}-{number}" for category in CATEGORIES for number in range(TAGS_PER_CATEGORY)])
    known = tags >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(known.sum(axis=1))]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, names.take(pa.array(tags[known])))
