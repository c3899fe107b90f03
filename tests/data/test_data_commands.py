"""`torchrank data …`: what the user types and reads."""

import json

import pytest
from click.testing import CliRunner

from torchrank.cli import cli
from torchrank.data.feed import FeedParameters


def run(*arguments):
    return CliRunner().invoke(cli, ["data", *map(str, arguments)])


def test_feed(tmp_path):
    arguments = ("feed", "--output", tmp_path / "set", "--users", 50, "--items", 60, "--days", 3, "--rows-per-day", 700)
    result = run(*arguments, "--seed", 5)
    assert result.exit_code == 0, result.output
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    wanted = {"users": 50, "items": 60, "days": 3, "rows_per_day": 700, "seed": 5, "format": 1}
    assert meta["parameters"] == wanted
    assert f"{sum(meta['rows'].values()):,} rows (train " in result.stdout
    assert "best reachable test AUC: click 0." in result.stdout
    again = run(*arguments, "--seed", 5)
    assert again.exit_code == 0
    assert "already there, with the same parameters; nothing was written" in again.stdout
    other = run(*arguments, "--seed", 6)
    assert other.exit_code == 1
    assert "Error: " in other.stderr
    assert "seed=5 (asked for 6)" in other.stderr
    assert "Traceback" not in other.output


def test_defaults_of_command_and_function_are_one():
    from torchrank.commands.data import feed

    options = {parameter.name: parameter.default for parameter in feed.params if parameter.name != "output"}
    defaults = FeedParameters()
    assert options == {name: getattr(defaults, name) for name in options}
    assert set(options) == {"users", "items", "days", "rows_per_day", "seed"}


def test_census_without_its_files(tmp_path):
    result = run("census", "--source", tmp_path, "--output", tmp_path / "set")
    assert result.exit_code == 1
    assert "neither census-income.data nor census-income.data.gz; accepted: UCI's two files" in result.stderr


@pytest.mark.parametrize("command", ["feed", "census"])
def test_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--output" in result.stdout
    assert "--seed" in result.stdout
