"""Writes docs/cli.md out of every command's `--help`: scripts/setup, then `.venv/bin/python scripts/cli_reference.py`.

A test (tests/packaging/test_cli_reference.py) holds the file against what this prints with `--print`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import click

from torchrank.cli import cli

TARGET = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# The `torchrank` command

Written by `scripts/cli_reference.py` from the commands' own `--help`; a test fails where the two differ.
"""


def sections(command: click.Command, context: click.Context) -> Iterator[str]:
    title = context.command_path
    yield f"## {title}\n\n```text\n{command.get_help(context).rstrip()}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            yield from sections(child, click.Context(child, info_name=name, parent=context, **child.context_settings))


def reference() -> str:
    # One width for everybody: click would else take the terminal's.
    top = click.Context(cli, info_name="torchrank", terminal_width=100, **cli.context_settings)
    return "\n".join([HEAD, *sections(cli, top)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes docs/cli.md from the commands' help.")
    parser.add_argument("--print", action="store_true", help="print it and write nothing")
    if parser.parse_args().print:
        print(reference(), end="")
    else:
        TARGET.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
