"""How fast raw columns become a FeatureBatch, beside the same work as a plain loop over rows.

    python scripts/bench/features.py [--rows 4096] [--repeat 30] [--json]

Training: an Arrow batch of 15 features, two of them histories of 50 strings. Serving: one request of one user and 500
candidates, 10 item columns, as decoded JSON. One thread; the median of `--repeat` runs. The plain loop computes the
same features row by row with python-xxhash; it checks nothing and knows no missing values.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from rich.console import Console
from rich.table import Table

from torchrank.features.spec import Bucketize, Combo, Feature, FeatureSpec, LastK, Raw, load_feature_spec
from torchrank.features.transform import FeatureTransform

HISTORY = 50
CANDIDATES = 500


def declaration() -> FeatureSpec:
    user_strings = ["user_id", "city", "device"]
    item_strings = ["item_id", "author", "category", "brand"]
    columns: dict[str, Any] = {name: {"side": "user", "type": "string"} for name in user_strings}
    columns |= {name: {"side": "item", "type": "string"} for name in item_strings}
    columns |= {name: {"side": "user", "type": "list<string>"} for name in ("recent_items", "recent_authors")}
    columns |= {name: {"side": "item", "type": "int64"} for name in ("shop", "age_days", "stock")}
    columns |= {name: {"side": "item", "type": "float32"} for name in ("price", "duration", "rating")}
    features: list[dict[str, Any]] = [
        {"name": name, "op": "id", "inputs": [name], "buckets": 1_000_000} for name in (*user_strings, *item_strings)
    ]
    features += [
        {"name": name, "op": "last_k", "inputs": [name], "buckets": 1_000_000, "max_length": HISTORY}
        for name in ("recent_items", "recent_authors")
    ]
    features += [
        {"name": "shop", "op": "id", "inputs": ["shop"], "num_embeddings": 1000},
        {"name": "age", "op": "bucketize", "inputs": ["age_days"], "boundaries": [1, 3, 7, 14, 30, 90, 365]},
        {"name": "stock", "op": "raw", "inputs": ["stock"], "log1p": True},
        {"name": "price", "op": "raw", "inputs": ["price"], "log1p": True},
        {"name": "rating", "op": "raw", "inputs": ["rating"], "zscore": [0.5, 0.3]},
        {"name": "duration", "op": "raw", "inputs": ["duration"], "minmax": [0, 600], "clip": [0, 600]},
        {"name": "city_category", "op": "combo", "inputs": ["city", "category"], "buckets": 1_000_000},
    ]
    return load_feature_spec({"columns": columns, "features": features})


def raw_rows(spec: FeatureSpec, rows: int, rng: np.random.Generator) -> dict[str, list[Any]]:
    def strings(count: int) -> list[str]:
        return [f"{'abcdefgh'[n % 8] * (n % 7)}{n}" for n in rng.integers(0, 10**9, count).tolist()]

    out: dict[str, list[Any]] = {}
    for name in spec.used_columns():
        kind = spec.columns[name].type
        if kind == "list<string>":
            flat = strings(rows * HISTORY)
            out[name] = [flat[row * HISTORY : (row + 1) * HISTORY] for row in range(rows)]
        elif kind == "string":
            out[name] = strings(rows)
        elif kind == "int64":
            out[name] = rng.integers(0, 1000, rows).tolist()
        else:
            out[name] = rng.random(rows).tolist()
    return out


def per_value(feature: Feature) -> Callable[[Any], Any]:
    """One feature of one row in plain Python: what a service without kernels would run."""
    if isinstance(feature, Raw):
        low, high = feature.clip or (-math.inf, math.inf)
        shift, top = feature.minmax or (0.0, 1.0)
        scale = top - shift
        if feature.log1p:
            return lambda value: (math.copysign(math.log1p(abs(value)), value) - shift) / scale
        return lambda value: (min(max(value, low), high) - shift) / scale
    if isinstance(feature, Bucketize):
        return lambda value: bisect.bisect_right(feature.boundaries, value)
    assert not isinstance(feature, Combo)
    buckets = feature.buckets
    if buckets is None:
        return lambda value: value if 0 <= value < feature.rows - 1 else feature.rows - 1
    if isinstance(feature, LastK):
        return lambda value: [bucket(text.encode(), 42, buckets) for text in value[-feature.max_length :]]
    return lambda value: bucket(value.encode(), 42, buckets)


def bucket(value: bytes, seed: int, buckets: int) -> int:
    h = xxhash.xxh64_intdigest(value, seed)
    return (h - (1 << 64) if h >> 63 else h) % buckets


def plain_loop(spec: FeatureSpec, rows: list[dict[str, Any]], names: set[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The features `names` of each row, one row after another; histories as one flat array without offsets."""
    single = [
        (f.name, f.inputs[0], per_value(f)) for f in spec.features if f.name in names and not isinstance(f, Combo)
    ]
    combos = [f for f in spec.features if f.name in names and isinstance(f, Combo)]
    out: dict[str, list[Any]] = {name: [] for name in names}
    for row in rows:
        for name, column, work in single:
            value = work(row[column])
            if isinstance(value, list):
                out[name] += value
            else:
                out[name].append(value)
        for combo in combos:
            h = 42
            for column in combo.inputs:
                h = xxhash.xxh64_intdigest(row[column].encode(), h)
            out[combo.name].append((h - (1 << 64) if h >> 63 else h) % combo.buckets)
    return {name: np.array(values) for name, values in out.items()}


def median_seconds(work: Callable[[], object], repeat: int) -> float:
    work()  # compiles
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    spec, rng = declaration(), np.random.default_rng(42)
    transform = FeatureTransform(spec)

    columns = raw_rows(spec, options.rows, rng)
    batch = pa.RecordBatch.from_pydict(columns)
    rows = batch.to_pylist()
    everything = {feature.name for feature in spec.features}
    train = median_seconds(lambda: transform.from_arrow(batch), options.repeat)
    train_loop = median_seconds(lambda: plain_loop(spec, rows, everything), 3)

    on_user = {name for name, side in spec.sides().items() if side == "user"}
    side = {name: column.side for name, column in spec.columns.items()}
    request = pa.RecordBatch.from_pydict(raw_rows(spec, CANDIDATES, rng)).to_pylist()
    user = {name: value for name, value in request[0].items() if side[name] == "user"}
    item_columns = [name for name in request[0] if side[name] == "item"]
    candidates = [{name: row[name] for name in item_columns} for row in request]

    def serve_by_loop() -> None:
        plain_loop(spec, [user], on_user)
        plain_loop(spec, [user | candidate for candidate in candidates], everything - on_user)

    serve = median_seconds(lambda: transform.from_request(user, {}, candidates), 10 * options.repeat)
    serve_loop = median_seconds(serve_by_loop, options.repeat)

    figures = {
        "train.rows": options.rows,
        "train.features": len(spec.features),
        "train.rows_per_s": round(options.rows / train),
        "train.loop_ratio": round(train_loop / train, 1),
        "serve.candidates": CANDIDATES,
        "serve.item_columns": len(item_columns),
        "serve.ms": round(serve * 1e3, 3),
        "serve.loop_ratio": round(serve_loop / serve, 2),
    }
    table = Table("path", "work", "this", "plain loop", "ratio")
    table.add_row(
        "training",
        f"{options.rows} rows, {len(spec.features)} features, two histories of {HISTORY}",
        f"{options.rows / train:,.0f} rows/s",
        f"{options.rows / train_loop:,.0f} rows/s",
        f"{train_loop / train:.1f}×",
    )
    table.add_row(
        "serving",
        f"1 user × {CANDIDATES} candidates × {len(item_columns)} columns",
        f"{serve * 1e3:.3f} ms",
        f"{serve_loop * 1e3:.3f} ms",
        f"{serve_loop / serve:.2f}×",
    )
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
