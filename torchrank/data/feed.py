"""The demonstration data set: a synthetic video feed as Parquet, one file per day.

    DIR/train/2025-01-01.parquet …   DIR/valid/…  the last day but one   DIR/test/…  the last day
    DIR/meta.json                    parameters, rows, shares of positive labels, the best reachable AUC

The labels `click` and `finish` are draws from probabilities that are written beside them (`p_click`, `p_finish`): no
model can rank better than those, so a model's AUC can be read against what there was to find.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torchrank.data.errors import DataError
from torchrank.data.feed_columns import FeedTables
from torchrank.data.feed_days import MEAN_CANDIDATES, Outcomes, Simulation
from torchrank.data.feed_world import World
from torchrank.data.new_folder import is_free, new_folder

FORMAT = 1  # raised whenever the same parameters give other bytes
FIRST_DAY = datetime(2025, 1, 1, tzinfo=UTC)
UNSEEN_DAYS = 5  # simulated before the first written one, so that histories are not empty
TASKS = ("click", "finish")


@dataclass(frozen=True)
class FeedParameters:
    """What the data is made of; the same parameters give the same bytes."""

    users: int = 3000
    items: int = 2000
    days: int = 10
    rows_per_day: int = 60_000
    seed: int = 0
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name, least in {"users": 2, "items": 10, "days": 3, "rows_per_day": 100, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")


def generate_feed(
    output: str | Path,
    users: int = FeedParameters.users,
    items: int = FeedParameters.items,
    days: int = FeedParameters.days,
    rows_per_day: int = FeedParameters.rows_per_day,
    seed: int = FeedParameters.seed,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the data set and returns what meta.json holds, with `created`: False where the same set was there already.

    rows_per_day: about so many candidates, 4 to 10 a request. The folder appears when it is complete, never before.
    Raises DataError for a folder with anything else in it. One process at a time may write a folder.
    """
    parameters = FeedParameters(users, items, days, rows_per_day, seed)
    target = Path(output)
    existing = _existing(target, parameters)
    if existing is not None:
        return {**existing, "created": False}
    with new_folder(target) as folder:
        meta = _write(folder, parameters, progress)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return {**meta, "created": True}


def _existing(target: Path, parameters: FeedParameters) -> dict[str, Any] | None:
    """The meta.json of a set with these parameters, None where the folder is free."""
    if is_free(target):
        return None
    accepted = "a new or empty folder, or one that this command wrote with the same parameters"
    try:
        meta: dict[str, Any] = json.loads((target / "meta.json").read_text())
        found = meta["parameters"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(str(target), found="something that is not a feed data set", accepted=accepted) from error
    wanted = asdict(parameters)
    if found != wanted:
        different = [
            f"{name}={found.get(name)} (asked for {wanted[name]})" for name in wanted if found.get(name) != wanted[name]
        ]
        raise DataError(str(target), found=f"a feed with {', '.join(different)}", accepted=accepted)
    return meta


def _write(folder: Path, parameters: FeedParameters, progress: bool) -> dict[str, Any]:
    generator = np.random.default_rng(parameters.seed)
    world = World(parameters.users, parameters.items, generator)
    tables = FeedTables(world, generator)
    simulation = Simulation(world, generator)
    requests = max(round(parameters.rows_per_day / MEAN_CANDIDATES), 1)
    tally = _Tally()
    with _bar(progress) as bar:
        task = bar.add_task("feed", total=UNSEEN_DAYS + parameters.days)
        for day in range(-UNSEEN_DAYS, parameters.days):
            outcomes = simulation.day(requests)
            if day >= 0:
                split = _split(day, parameters.days)
                _write_day(folder / split, tables, outcomes, day, requests)
                tally.add(split, outcomes)
            bar.advance(task)
    return {"parameters": asdict(parameters), **tally.summary()}


def _split(day: int, days: int) -> str:
    return "test" if day == days - 1 else "valid" if day == days - 2 else "train"


def _write_day(folder: Path, tables: FeedTables, outcomes: Outcomes, day: int, requests: int) -> None:
    date = FIRST_DAY + timedelta(days=day)
    folder.mkdir(exist_ok=True)
    batches = tables.batches(outcomes, date.weekday(), int(date.timestamp()), day * requests)
    first = next(batches)
    # Without Arrow's own schema the file depends on nothing but the values, and any reader sees plain strings.
    with pq.ParquetWriter(
        folder / f"{date:%Y-%m-%d}.parquet", first.schema, compression="zstd", store_schema=False
    ) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("days"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


class _Tally:
    """Labels and probabilities of what was written: two floats and two bits per row."""

    def __init__(self) -> None:
        self._parts: dict[str, list[list[NDArray[Any]]]] = {}

    def add(self, split: str, outcomes: Outcomes) -> None:
        columns = (outcomes.clicked, outcomes.p_click, outcomes.finished, outcomes.p_finish)
        self._parts.setdefault(split, []).append([column[outcomes.shown] for column in columns])

    def summary(self) -> dict[str, Any]:
        rows, positive, best = {}, {}, {}
        for split, parts in self._parts.items():
            click, p_click, finish, p_finish = (np.concatenate(column) for column in zip(*parts, strict=True))
            pairs = dict(zip(TASKS, ((click, p_click), (finish, p_finish)), strict=True))
            rows[split] = len(click)
            positive[split] = {task: float(labels.mean()) for task, (labels, _) in pairs.items()}
            best[split] = {task: auc(labels, scores) for task, (labels, scores) in pairs.items()}
        return {"rows": rows, "positive_share": positive, "auc_best_reachable": best}


def auc(labels: NDArray[np.bool_], scores: NDArray[np.float32]) -> float | None:
    """Area under the ROC curve, ties counted half (Mann-Whitney); None where only one class is there."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mean rank, from 1, of each group of ties
    return float((rank[inverse][labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))
