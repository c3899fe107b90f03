"""Latency against candidates and users, measured, and drawn as an SVG for the docs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from scripts.bench.export_models import random_request
from scripts.bench.export_sessions import in_onnx_runtime, medians_ms, open_session
from torchrank.features.schema import FeatureSchema

CANDIDATES = (1, 10, 50, 100, 500, 1000, 2000, 5000)
USERS = (1, 4, 8)

Curve = dict[int, float]  # ms by candidates
Curves = dict[tuple[str, int], Curve]  # of a graph, for so many users

# Greys and colours that stand out on white and on black alike; the lines of more users are dashed.
_INK, _GRID = "#808080", "#80808040"
_COLOURS = {"exporter": "#e0702a", "fp32": "#3b8bea"}
_LABELS = {"exporter": "exporter's graph", "fp32": "optimised graph"}
_DASHES = {1: "none", 4: "7 3", 8: "2 3"}
_PANEL, _HEIGHT, _LEFT, _TOP = 330, 250, 50, 80
_GAP, _RIGHT = 70, 24


def sweep(files: Mapping[str, Path], schema: FeatureSchema, *, threads: int, seconds: float = 4.0) -> Curves:
    """Medians of both graphs, for all numbers of users in turn; about `seconds` for each number of candidates."""
    sessions = {graph: open_session(files[graph], threads) for graph in _COLOURS}
    curves: Curves = {(graph, users): {} for graph in _COLOURS for users in USERS}
    for candidates in CANDIDATES:
        sides = {}
        for users in USERS:
            if users <= candidates:
                feed = random_request(schema, users=users, candidates=candidates, seed=candidates)
                sides |= {(graph, users): in_onnx_runtime(session, feed) for graph, session in sessions.items()}
        for curve, elapsed in medians_ms(sides, rounds=200, seconds=seconds).items():
            curves[curve][candidates] = elapsed
    return curves


def draw(panels: Mapping[str, Curves]) -> str:
    """One pair of logarithmic axes per model, side by side."""
    width = _LEFT + len(panels) * (_PANEL + _GAP) - _GAP + _RIGHT
    height = _TOP + _HEIGHT + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}" stroke-linejoin="round">',
        *_legend(),
    ]
    for number, (title, curves) in enumerate(panels.items()):
        parts += _panel(title, curves, _LEFT + number * (_PANEL + _GAP))
    return "\n".join([*parts, "</svg>", ""])


def _legend() -> list[str]:
    parts, x = [], float(_LEFT)
    for graph, colour in _COLOURS.items():
        parts += [_line([(x, 16), (x + 24, 16)], colour), _text(x + 30, 20, _LABELS[graph])]
        x += 150
    for users, dash in _DASHES.items():
        name = "1 user" if users == 1 else f"{users} users"
        parts += [_line([(x, 16), (x + 24, 16)], _INK, dash), _text(x + 30, 20, name)]
        x += 90
    return parts


def _panel(title: str, curves: Curves, left: float) -> list[str]:
    values = [elapsed for curve in curves.values() for elapsed in curve.values()]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = math.log10(CANDIDATES[-1])

    def at(candidates: float, elapsed: float) -> tuple[float, float]:
        share = (math.log10(elapsed) - low) / (high - low)
        return left + math.log10(candidates) / last * _PANEL, _TOP + _HEIGHT * (1 - share)

    parts = [_text(left, _TOP - 28, title, size=14), _text(left - 8, _TOP - 14, "ms", anchor="end")]
    for power in range(low, high + 1):
        x, y = at(1, 10.0**power)
        parts += [_line([(x, y), (x + _PANEL, y)], _GRID, width=1)]
        parts += [_text(x - 8, y + 4, f"{10.0**power:g}", anchor="end")]
    for candidates in (1, 10, 100, 1000, 5000):
        x, y = at(candidates, 10.0**low)
        parts += [_line([(x, y), (x, y - _HEIGHT)], _GRID, width=1)]
        parts += [_text(x, y + 18, f"{candidates:,}", anchor="middle")]
    parts += [_text(left + _PANEL / 2, _TOP + _HEIGHT + 36, "candidates", anchor="middle")]
    for (graph, users), curve in curves.items():
        points = [at(candidates, elapsed) for candidates, elapsed in curve.items()]
        parts += [_line(points, _COLOURS[graph], _DASHES[users], width=2)]
    return parts


def _line(points: Sequence[tuple[float, float]], colour: str, dash: str = "none", width: float = 2) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'
