"""Days of the synthetic feed: who asks when, which candidates are shown, what happens, what is remembered.

Users act in rounds: the n-th request of every user that day is one array operation, so that a user's second request
of a day sees what came of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrank.data.feed_world import NETWORK_SHARES, NETWORKS, Ints, Requests, World

FEWEST_CANDIDATES, MOST_CANDIDATES = 4, 10
MEAN_CANDIDATES = (FEWEST_CANDIDATES + MOST_CANDIDATES) / 2
HISTORY = 20
INTEREST_CHANGES = 0.15  # probability per day and interest
OUT_OF_INTEREST = 0.35  # share of candidates that come out of the user's current interests
# requests per hour, from midnight: quiet at night, a peak at noon and one in the evening
_HOURS = np.array([3, 2, 1, 1, 1, 2, 4, 6, 6, 5, 5, 7, 9, 7, 5, 5, 6, 7, 9, 11, 12, 11, 8, 5], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """R requests in the order of time, and what came of their K candidates; those with `shown` False are padding.

    second: int64 [R], of the day; shown, clicked, finished: bool [R, K]; p_click, p_finish: float32 [R, K].
    """

    requests: Requests
    second: Ints
    shown: NDArray[np.bool_]
    clicked: NDArray[np.bool_]
    finished: NDArray[np.bool_]
    p_click: NDArray[np.float32]
    p_finish: NDArray[np.float32]


class Simulation:
    """The moving part: histories and current interests, advanced by `day`."""

    def __init__(self, world: World, generator: np.random.Generator) -> None:
        users = len(world.users.age)
        self._world = world
        self._generator = generator
        self._item = np.zeros((users, HISTORY), dtype=np.int64)  # rings: finish n of a user is in slot n % HISTORY
        self._watch = np.zeros((users, HISTORY), dtype=np.float32)
        self._finishes = np.zeros(users, dtype=np.int64)
        everyone = np.arange(users)
        self._hot = np.stack([world.draw_interests(everyone, generator) for _ in range(2)], axis=1)

    def day(self, requests: int) -> Outcomes:
        self._drift()
        user, second, turn = self._arrivals(requests)
        rounds = [self._round(user[turn == number], second[turn == number]) for number in range(int(turn.max()) + 1)]
        return _in_time(rounds)

    def _drift(self) -> None:
        for interest in range(self._hot.shape[1]):
            changed = np.flatnonzero(self._generator.random(len(self._hot)) < INTEREST_CHANGES)
            self._hot[changed, interest] = self._world.draw_interests(changed, self._generator)

    def _arrivals(self, requests: int) -> tuple[Ints, Ints, Ints]:
        """User, second of the day, and the how-manieth request of that user this is. [R] each."""
        generator = self._generator
        user = generator.choice(len(self._hot), size=requests, p=self._world.users.activity)
        hour = generator.choice(24, size=requests, p=_HOURS / _HOURS.sum())
        second = hour * 3600 + generator.integers(3600, size=requests)
        order = np.lexsort([second, user])
        user, second = user[order], second[order]
        first = np.concatenate([[True], user[1:] != user[:-1]])
        position = np.arange(requests)
        return user, second, position - np.maximum.accumulate(np.where(first, position, 0))

    def _round(self, user: Ints, second: Ints) -> Outcomes:
        """At most one request per user."""
        generator = self._generator
        candidates, shown = self._candidates(user)
        history, watch, length = self._histories(user)
        network = generator.choice(len(NETWORKS), size=len(user), p=NETWORK_SHARES)
        requests = Requests(user, second // 3600, network, candidates, self._hot[user], history, watch, length)
        p_click, p_finish = self._world.probabilities(requests)
        clicked = shown & (generator.random(p_click.shape) < p_click)
        finished = clicked & (generator.random(p_click.shape) * p_click < p_finish)
        self._remember(user, candidates, finished)
        return Outcomes(requests, second, shown, clicked, finished, p_click, p_finish)

    def _candidates(self, user: Ints) -> tuple[Ints, NDArray[np.bool_]]:
        """Different items by popularity, some out of the user's interests. [R, K] each."""
        generator, items = self._generator, self._world.items
        shape = (len(user), MOST_CANDIDATES)
        draw = generator.random(shape)
        by_popularity = np.searchsorted(items.cumulative, draw)
        order, running, begins = items.by_category
        category = self._hot[user][np.arange(len(user))[:, None], generator.integers(2, size=shape)]
        low, high = begins[category], begins[category + 1]
        by_interest = order[np.minimum(np.searchsorted(running, low + draw * (high - low)), len(order) - 1)]
        wanted = (generator.random(shape) < OUT_OF_INTEREST) & (high > low)
        chosen = np.where(wanted, by_interest, np.minimum(by_popularity, len(order) - 1))

        ranked = np.argsort(chosen, axis=1, kind="stable")
        ordered = np.take_along_axis(chosen, ranked, axis=1)
        again = np.zeros(shape, dtype=bool)
        np.put_along_axis(again, ranked[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        count = generator.integers(FEWEST_CANDIDATES, MOST_CANDIDATES + 1, size=len(user))
        return chosen, ~again & (np.cumsum(~again, axis=1) <= count[:, None])

    def _histories(self, user: Ints) -> tuple[Ints, NDArray[np.float32], Ints]:
        """Items and watch seconds [R, HISTORY], oldest first, zeros beyond the length; length [R]."""
        finishes = self._finishes[user][:, None]
        length = np.minimum(finishes, HISTORY)
        position = np.arange(HISTORY)
        slot = (finishes - length + position) % HISTORY
        known = position < length
        item = np.where(known, self._item[user[:, None], slot], 0)
        watch = np.where(known, self._watch[user[:, None], slot], np.float32(0))
        return item, watch, length[:, 0]

    def _remember(self, user: Ints, candidates: Ints, finished: NDArray[np.bool_]) -> None:
        row, column = np.nonzero(finished)
        item = candidates[row, column]
        nth = (np.cumsum(finished, axis=1) - 1)[row, column]
        slot = (self._finishes[user[row]] + nth) % HISTORY
        self._item[user[row], slot] = item
        # some watch a part once more
        replay = 1 + 0.5 * self._generator.random(len(row)) ** 3
        self._watch[user[row], slot] = (self._world.items.duration[item] * replay).round(1)
        self._finishes[user] += finished.sum(axis=1)


def _in_time(rounds: list[Outcomes]) -> Outcomes:
    """All rounds of a day as one, by second; requests of the same second by user."""
    order = np.lexsort(
        [np.concatenate([part.requests.user for part in rounds]), np.concatenate([part.second for part in rounds])]
    )

    def gathered(parts: Sequence[object], name: str) -> NDArray[Any]:
        array: NDArray[Any] = np.concatenate([getattr(part, name) for part in parts])[order]
        return array

    requests = [part.requests for part in rounds]
    own = [field.name for field in fields(Outcomes) if field.name != "requests"]
    return Outcomes(
        requests=Requests(**{field.name: gathered(requests, field.name) for field in fields(Requests)}),
        **{name: gathered(rounds, name) for name in own},
    )
