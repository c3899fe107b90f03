"""The people and videos of the synthetic feed, and how likely one finishes another.

A click is a Bernoulli draw whose logit is the sum of what ranking models try to find: taste (a dot product of latent
factors that mostly follow from age, gender and city on one side, category and tags on the other), popularity, the
quality of author and video, the hour, what the user finished lately (most recent first), and a current interest that
nobody sees but that drifts and leaves its trace in the history. Finishing a clicked video depends on the same and on
duration and network.

Letters: U users, M items, R requests, K candidates per request (padded), T history length, C categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CATEGORIES = (
    "animals", "beauty", "cars", "comedy", "fitness", "food", "football", "games", "music", "news", "science", "travel",
)  # fmt: skip
TAGS_PER_CATEGORY = 6
GENDERS = ("female", "male", "other")
CITIES = (
    "Shanghai", "Delhi", "Tokyo", "Sao Paulo", "Mexico City", "Cairo", "Mumbai", "Beijing", "Dhaka", "Osaka",
    "New York", "Karachi", "Buenos Aires", "Istanbul", "Kolkata", "Manila", "Lagos", "Rio de Janeiro", "Paris", "Lima",
)  # fmt: skip
DEVICES = ("android-phone", "iphone", "android-tablet", "ipad", "tv", "web")
NETWORKS = ("wifi", "5g", "4g", "3g")
NETWORK_SHARES = (0.55, 0.2, 0.2, 0.05)
AGE_BOUNDS = (18, 25, 35, 45, 55)
FACTORS = 8
ZIPF = 0.9
RECENCY = 0.88  # weight of a history entry relative to the one after it


@dataclass(frozen=True, slots=True)
class Users:
    """[U] each, but `factor` [U, FACTORS]. `openness` moves the logits of everything; `activity` sums to 1."""

    age: Ints
    gender: Ints
    city: Ints
    device: Ints
    factor: Floats
    openness: Floats
    activity: Floats


@dataclass(frozen=True)
class Items:
    """[M] each, but `tags` [M, 3] (position in the list of all tags, -1: none) and `factor` [M, FACTORS].

    `popularity` sums to 1; `quality` and `grip` move the logits of click and finish; `duration` is in seconds.
    """

    category: Ints
    tags: Ints
    author: Ints
    duration: NDArray[np.float32]
    factor: Floats
    popularity: Floats
    quality: Floats
    grip: Floats

    @cached_property
    def cumulative(self) -> Floats:
        return np.cumsum(self.popularity)

    @cached_property
    def by_category(self) -> tuple[Ints, Floats, Floats]:
        """Items sorted by category, the running sum of their popularity, and where each category begins in that sum."""
        order = np.argsort(self.category, kind="stable")
        running = np.cumsum(self.popularity[order])
        counts = np.bincount(self.category, minlength=len(CATEGORIES))
        begins = np.concatenate([[0.0], running])[np.concatenate([[0], np.cumsum(counts)])]
        return order, running, begins


@dataclass(frozen=True, slots=True)
class Requests:
    """What is known when R requests arrive: user, hour, network [R]; candidates [R, K]; hot [R, 2] current interests;
    history_item [R, T] oldest first (entries beyond history_length are 0), history_watch [R, T] seconds."""

    user: Ints
    hour: Ints
    network: Ints
    candidates: Ints
    hot: Ints
    history_item: Ints
    history_watch: NDArray[np.float32]
    history_length: Ints


class World:
    """Everything that stays as it is from the first day to the last."""

    def __init__(self, users: int, items: int, generator: np.random.Generator) -> None:
        self.category_factor = generator.normal(size=(len(CATEGORIES), FACTORS))
        self.items = _make_items(items, self.category_factor, generator)
        self.users = _make_users(users, generator)
        self._hour_taste = generator.normal(size=(4, len(CATEGORIES)))  # quarter of the day × category
        self._scale = self._taste_scale(generator)

    def _taste_scale(self, generator: np.random.Generator) -> float:
        """Brings taste to a standard deviation of 1, so that the coefficients of `probabilities` can be compared."""
        user = generator.integers(len(self.users.age), size=4096)
        item = generator.integers(len(self.items.author), size=4096)
        return 1 / float(np.std((self.users.factor[user] * self.items.factor[item]).sum(axis=1)))

    def draw_interests(self, user: Ints, generator: np.random.Generator) -> Ints:
        """One current interest per user: a category, more often of those the user likes anyway (Gumbel-max)."""
        liking = self.users.factor[user] @ self.category_factor.T * self._scale
        chosen: Ints = np.argmax(0.7 * liking + generator.gumbel(size=liking.shape), axis=1)
        return chosen

    def probabilities(self, requests: Requests) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """p(click) and p(finish), the latter not conditional on the click. Both float32 [R, K]."""
        items, candidates = self.items, requests.candidates
        category = items.category[candidates]
        taste = np.einsum("rf,rkf->rk", self.users.factor[requests.user], items.factor[candidates]) * self._scale
        popular = np.log(items.popularity[candidates] * len(items.author))
        hour = self._hour_taste[requests.hour[:, None] // 6, category]
        hot = (category[:, :, None] == requests.hot[:, None, :]).any(axis=2)
        recent = self._recent(requests, category)
        length = (np.log(items.duration[candidates]) - np.log(30)) / 0.8
        slow = (requests.network >= 2)[:, None]
        openness = self.users.openness[requests.user][:, None]

        click = (
            -1.9 + 0.4 * taste + 0.3 * popular + items.quality[candidates] + openness + 0.3 * hour
            + 0.3 * hot + 2.6 * recent - 0.2 * length
        )  # fmt: skip
        finish = (
            -0.6 + 0.4 * taste + items.grip[candidates] + 0.5 * openness + 0.25 * hot + 1.5 * recent
            - (0.7 + 0.5 * slow) * length - 0.3 * slow
        )  # fmt: skip
        p_click = _sigmoid(click)
        return p_click.astype(np.float32), (p_click * _sigmoid(finish)).astype(np.float32)

    def _recent(self, requests: Requests, category: Ints) -> Floats:
        """[R, K]: the share of the candidate's category in the history, weighted by recency and watch time."""
        slots = requests.history_item.shape[1]
        age = requests.history_length[:, None] - 1 - np.arange(slots)
        weight = np.where(age >= 0, RECENCY ** np.maximum(age, 0), 0.0)
        weight *= 0.5 + 0.5 * np.minimum(requests.history_watch / 60, 1)
        share = np.zeros((len(requests.user), len(CATEGORIES)))
        rows = np.arange(len(requests.user))
        history_category = self.items.category[requests.history_item]
        for slot in range(slots):  # no (row, category) pair occurs twice within one slot
            share[rows, history_category[:, slot]] += weight[:, slot]
        share /= np.maximum(weight.sum(axis=1, keepdims=True), 1)
        return np.take_along_axis(share, category, axis=1)


def _make_items(count: int, category_factor: Floats, generator: np.random.Generator) -> Items:
    tag_factor = np.repeat(category_factor, TAGS_PER_CATEGORY, axis=0)
    tag_factor = tag_factor + 0.8 * generator.normal(size=tag_factor.shape)
    authors = max(count // 15, 1)
    author_category = generator.choice(len(CATEGORIES), size=authors, p=_zipf(len(CATEGORIES), 0.6))
    author_quality = generator.normal(size=(2, authors))

    author = generator.choice(authors, size=count, p=_zipf(authors, 0.5))
    strays = generator.random(count) < 0.15
    category = np.where(strays, generator.integers(len(CATEGORIES), size=count), author_category[author])
    # one to three different tags of the category
    within = np.argsort(generator.random((count, TAGS_PER_CATEGORY)), axis=1)[:, :3]
    number = generator.integers(1, 4, size=count)
    chosen = np.arange(3) < number[:, None]
    tags = np.where(chosen, category[:, None] * TAGS_PER_CATEGORY + within, -1)
    of_tags = (tag_factor[tags] * chosen[:, :, None]).sum(axis=1) / number[:, None]
    own = generator.normal(size=(count, FACTORS))
    quality, grip = 0.5 * author_quality[:, author] + 0.15 * generator.normal(size=(2, count))
    return Items(
        category=category,
        tags=tags,
        author=author,
        duration=np.clip(np.exp(generator.normal(np.log(30), 0.8, size=count)), 3, 600).round(1).astype(np.float32),
        factor=0.7 * category_factor[category] + 0.4 * of_tags + 0.1 * own,
        popularity=generator.permutation(_zipf(count, ZIPF)),
        quality=quality,
        grip=grip,
    )


def _make_users(count: int, generator: np.random.Generator) -> Users:
    age = np.clip(generator.normal(33, 13, size=count), 13, 80).astype(np.int64)
    gender = generator.choice(len(GENDERS), size=count, p=(0.48, 0.48, 0.04))
    city = generator.choice(len(CITIES), size=count, p=_zipf(len(CITIES), 0.7))
    device = generator.choice(len(DEVICES), size=count, p=(0.45, 0.25, 0.08, 0.07, 0.08, 0.07))
    group = np.digitize(age, AGE_BOUNDS)
    of_group = generator.normal(size=(len(AGE_BOUNDS) + 1, len(GENDERS), FACTORS))
    of_city = generator.normal(size=(len(CITIES), FACTORS))
    own = generator.normal(size=(count, FACTORS))
    activity = generator.lognormal(sigma=0.6, size=count)
    return Users(
        age=age,
        gender=gender,
        city=city,
        device=device,
        factor=0.8 * of_group[group, gender] + 0.25 * of_city[city] + 0.2 * own,
        openness=generator.normal(size=len(AGE_BOUNDS) + 1)[group] * 0.4
        + generator.normal(size=len(DEVICES))[device] * 0.4
        + generator.normal(size=count) * 0.2,
        activity=activity / activity.sum(),
    )


def _zipf(count: int, exponent: float) -> Floats:
    weights = np.arange(1, count + 1) ** -exponent
    shares: Floats = weights / weights.sum()
    return shares


def _sigmoid(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))
