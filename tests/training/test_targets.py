"""Objects named by `_target_`: what the user mistyped is told in one line, by its key."""

from __future__ import annotations

import pytest
from hydra.errors import InstantiationException

from torchrank.data import ParquetSource
from torchrank.training.targets import build_target


def test_builds_and_builds_later() -> None:
    source = build_target("data", {"_target_": "torchrank.data.ParquetSource", "path": "x"})
    assert isinstance(source, ParquetSource)
    assert source.path == "x"
    later = build_target("optimizer.dense", {"_target_": "fractions.Fraction", "denominator": 4}, partial=True)
    assert later(3) == 0.75


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "torchrank.data.ParquetSource", "pth": "x"}, r"^data: .*unexpected keyword argument 'pth'"),
        ({"_target_": "torchrank.data.ParketSource"}, r"(?s)^data: .*ParketSource"),
        ({"_target_": "fractions.Fraction", "numerator": "a"}, "^data: Invalid literal for Fraction: 'a'"),
    ],
)
def test_the_users_mistakes_are_one_error(config: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_target("data", config)


def test_a_bug_of_the_target_keeps_its_traceback() -> None:
    with pytest.raises(InstantiationException):
        build_target("data", {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 0})
