from __future__ import annotations

import pytest

from embedding_store.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86_400), ("7d", 604_800), (" 1.5 H ", 5400), ("0", 0)]
)
def test_what_people_write(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1s", "1w", "1h30m", "1e3s", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=f"duration '{text}': expected a number and a unit"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172_799, "48 h"), (3e5, "3 d")],
)
def test_what_people_read(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
