"""The `torchrank` command. `COMMANDS` is the whole of it; each command's module is imported when it is called.

exit 0    done
exit 1    the user can mend it: one line, `Error: …` (`--debug` shows where it came from)
exit 2    wrong usage
exit 130  Ctrl-C
"""

from __future__ import annotations

import errno
import importlib
from typing import NamedTuple

import click

from torchrank import __version__


class Entry(NamedTuple):
    """Where a click command is, and its line in `torchrank --help` (which thus needs no import)."""

    module: str
    attribute: str
    summary: str


COMMANDS: dict[str, Entry] = {
    "data": Entry("torchrank.commands.data", "data", "Write the demonstration data sets."),
    "train": Entry("torchrank.commands.training", "train", "Train a model; takes Hydra overrides."),
    "evaluate": Entry("torchrank.commands.training", "evaluate", "Measure a run: AUC, logloss, calibration, GAUC."),
    "predict": Entry("torchrank.commands.training", "predict", "Write a run's scores beside a data set's columns."),
    "export": Entry("torchrank.commands.export", "export", "Turn a run into a bundle that serves without torch."),
    "publish": Entry("torchrank.commands.store", "publish", "Copy a bundle's tables into a store as a new release."),
    "verify": Entry("torchrank.commands.verify", "verify", "Compare a release in a store with its bundle; mend it."),
    "releases": Entry("torchrank.commands.store", "releases", "List the releases of a store."),
    "activate": Entry("torchrank.commands.store", "activate", "Make a release the active one of its model."),
    "rollback": Entry("torchrank.commands.store", "rollback", "Return to the release that was active before."),
    "gc": Entry("torchrank.commands.gc", "gc", "Remove the releases that nobody needs any more."),
    "store": Entry("torchrank.commands.store_plan", "store", "Plan the memory of a store and of its caches."),
    "sidecar": Entry("torchrank.commands.sidecar", "sidecar", "Answer embedding look-ups out of cache and store."),
    "serve": Entry("torchrank.commands.serve", "serve", "Rank candidates over HTTP."),
}


class LazyGroup(click.Group):
    """Knows its commands by name and summary, and imports one only to run it or to show that command's help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)  # in the order of the path, not of the alphabet

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = getattr(importlib.import_module(entry.module), entry.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)
        except Exception as error:
            message = None if ctx.params["debug"] else for_the_user(error)
            if message is None:
                raise
            raise click.ClickException(message) from error


def for_the_user(error: Exception) -> str | None:
    """The line to show for an error that the user can mend; None for a bug of ours, whose traceback is wanted.

    The former are wrong values and files, whatever a store reports, and an extra that is not installed. KeyError,
    TypeError, AssertionError and the like are never raised on purpose (embedding_store's Unknown… aside).
    """
    from embedding_store.errors import StoreError

    if isinstance(error, StoreError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in {"torchrank", "embedding_store", "export"}:
            return None
        return f"this command needs {package}, which is not installed: install torchrank[train] or torchrank[serve]"
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return None  # our reader went away, as in `torchrank releases … | head -1`: click ends quietly
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return str(error) or type(error).__name__
    return None


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="torchrank")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """From raw columns to a ranked list."""


def main() -> None:
    """The console script."""
    cli.main(prog_name="torchrank")


if __name__ == "__main__":
    main()
