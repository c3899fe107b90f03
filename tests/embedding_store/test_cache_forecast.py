"""What the forecast says of a cache beside what HotCache does, on other requests of the same traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from embedding_store.access_counts import AccessCounts, count_groups, write_counts
from embedding_store.batch import IdBatch
from embedding_store.cache_forecast import POLICIES, SIDECAR_BYTES, STEP_BYTES, CacheForecast, HitRate, read_forecast
from embedding_store.dedupe import dedupe
from embedding_store.hit_rates import popularity
from embedding_store.hot_cache import HotCache
from embedding_store.lookup import FOUND
from embedding_store.release import ReleaseManifest, TableInfo

COUNTED, ASKED = 8_000, 6_000  # requests


@dataclass
class Traffic:
    """Of one table: ids of a request are drawn by Zipf's law."""

    rows: int
    dim: int
    per_request: int
    zipf: float

    def requests(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """int64 [count, per_request]"""
        share = np.arange(1, self.rows + 1) ** -self.zipf
        places = np.searchsorted(np.cumsum(share / share.sum()), rng.random((count, self.per_request)))
        return np.random.default_rng(0).permutation(self.rows)[np.minimum(places, self.rows - 1)]

    def counted(self, rng: np.random.Generator) -> AccessCounts:
        ids = self.requests(COUNTED, rng)
        distinct = np.concatenate([np.unique(request) for request in ids])
        asked = np.bincount(distinct, minlength=self.rows)
        return count_groups(asked, np.bincount(ids.ravel(), minlength=self.rows), COUNTED)


TRAFFIC = {  # items and their categories have rows of one width, and share entries
    "item": Traffic(60_000, 16, per_request=60, zipf=0.9),
    "category": Traffic(800, 16, per_request=30, zipf=0.8),
    "author": Traffic(8_000, 32, per_request=10, zipf=0.6),
}


def generator(seed: int) -> np.random.Generator:
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def manifest_of(traffic: dict[str, Traffic]) -> ReleaseManifest:
    tables = tuple(
        TableInfo(name=name, rows=t.rows, dim=t.dim, codec="fp16", row_bytes=2 * t.dim, page_rows=63, sha256="")
        for name, t in traffic.items()
    )
    return ReleaseManifest("feed", "1", "2026-01-02T03:04:05Z", tables)


def batches(traffic: dict[str, Traffic], rng: np.random.Generator) -> Iterator[tuple[IdBatch, NDArray[np.int64]]]:
    """The distinct ids of each request, and how often it names each."""
    asked = [table.requests(ASKED, rng) for table in traffic.values()]
    for request in range(ASKED):
        distinct = [dedupe(ids[request]) for ids in asked]
        repeats = np.concatenate([np.bincount(index) for _, index in distinct])
        counts = np.array([len(ids) for ids, _ in distinct])
        yield IdBatch(np.arange(len(asked)), counts, np.concatenate([ids for ids, _ in distinct])), repeats


def measured(traffic: dict[str, Traffic], budget: int, policy: str, rng: np.random.Generator) -> HitRate:
    """Of the second half of the requests."""
    manifest, cache = manifest_of(traffic), HotCache(budget, policy)
    tables = cache.tables(manifest)
    widths = np.array([table.row_bytes for table in manifest.tables])
    named: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    missed = asked = 0
    for request, (batch, repeats) in enumerate(batches(traffic, rng)):
        status = np.zeros(len(batch.ids), np.uint8)
        sizes = batch.counts * widths
        misses = cache.probe(tables, batch, np.empty(sizes.sum(), np.uint8), np.cumsum(sizes) - sizes, status)
        table_of = np.repeat(batch.tables, batch.counts)
        lost = np.bincount(table_of[misses], minlength=len(widths))
        rows = np.zeros((lost * widths).sum(), np.uint8)
        cache.insert(
            tables, IdBatch(batch.tables, lost, batch.ids[misses]), rows, np.full(len(misses), FOUND, np.uint8)
        )
        if request < ASKED // 2:
            continue
        present = np.ones(len(batch.ids), np.bool_)
        present[misses] = False
        for place, name in enumerate(traffic):
            of_table = table_of == place
            named[name] += int(repeats[of_table].sum())
            hits[name] += int(repeats[of_table & present].sum())
        missed += len(misses)
        asked += len(batch.ids)
    tables_rates = {name: hits[name] / named[name] for name in named}
    return HitRate(hits.total() / named.total(), 1 - missed / asked, missed / (ASKED - ASKED // 2), tables_rates)


def forecast_of(traffic: dict[str, Traffic], rng: np.random.Generator) -> CacheForecast:
    popular = {name: popularity(table.counted(rng), table.rows) for name, table in traffic.items()}
    return CacheForecast(manifest_of(traffic), COUNTED, popular)


@pytest.mark.parametrize("cache_bytes", [100_000, 500_000, 2_000_000])
@pytest.mark.parametrize(("policy", "error"), [("lru", 0.01), ("s3fifo", 0.02)])
def test_hit_rates_of_several_tables(policy: str, error: float, cache_bytes: int) -> None:
    rng = generator(4)
    plan = forecast_of(TRAFFIC, rng).at(cache_bytes)
    predicted, found = plan.rates[policy], measured(TRAFFIC, cache_bytes, policy, rng)
    print(f"{policy}, {cache_bytes} bytes: predicted {predicted}, measured {found}")
    assert predicted.raw == pytest.approx(found.raw, abs=error)
    assert predicted.distinct == pytest.approx(found.distinct, abs=error)
    assert predicted.fetched_per_request == pytest.approx(found.fetched_per_request, abs=error * 100)
    assert predicted.tables == pytest.approx(found.tables, abs=2 * error)


@pytest.mark.parametrize("zipf", [0.6, 0.8, 1.05, 1.3])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.4])
def test_the_default_policy_is_where_its_fit_says(zipf: float, share: float) -> None:
    traffic = {"item": Traffic(40_000, 16, per_request=200, zipf=zipf)}
    rng = generator(8)
    cache_bytes = int(share * 40_000 * 48)
    predicted = {policy: rate.raw for policy, rate in forecast_of(traffic, rng).at(cache_bytes).rates.items()}
    found = measured(traffic, cache_bytes, "s3fifo", rng).raw
    print(f"zipf {zipf}, {share:.0%}: predicted {predicted}, measured {found}")
    assert predicted["s3fifo"] == pytest.approx(found, abs=0.02)
    assert predicted["lru"] <= predicted["s3fifo"] <= predicted["ideal"]


def test_entries_are_those_that_the_cache_has() -> None:
    forecast = forecast_of(TRAFFIC, generator(5))
    for cache_bytes in (0, 100, 100_000, 3_000_000, 50_000_000):
        cache = HotCache(cache_bytes)
        cache.tables(manifest_of(TRAFFIC))
        plan = forecast.at(cache_bytes)
        assert plan.entries == pytest.approx(cache.stats().capacity, abs=16)
        assert plan.sidecar_bytes - SIDECAR_BYTES == pytest.approx(cache.stats().bytes, abs=1024)
        assert (plan.bytes, plan.entries > 0) == (cache_bytes, cache_bytes > 1000)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_size_for_a_hit_rate_is_the_smallest(policy: str) -> None:
    forecast = forecast_of({"item": Traffic(400_000, 16, per_request=60, zipf=0.9)}, generator(6))
    for share in (0.5, 0.8, 0.9, 1.0):
        size = forecast.bytes_for(share, policy)
        assert size % STEP_BYTES == 0
        assert forecast.at(size).rates[policy].raw >= share
        assert size == STEP_BYTES or forecast.at(size - STEP_BYTES).rates[policy].raw < share


def test_a_bundle_that_does_not_say_what_is_asked_for(tmp_path: Path) -> None:
    manifest = manifest_of(TRAFFIC)
    (tmp_path / "tables").mkdir()
    for name in TRAFFIC:
        assert read_forecast(tmp_path, manifest) is None  # of one table at least
        write_counts(tmp_path / "tables", name, AccessCounts(0, ()))
    assert read_forecast(tmp_path, manifest) is None  # counts of nothing
    write_counts(tmp_path / "tables", "item", TRAFFIC["item"].counted(generator(7)))
    forecast = read_forecast(tmp_path, manifest)
    assert forecast is not None
    assert forecast.at(1 << 20).rates["lru"].tables.keys() == {"item"}
