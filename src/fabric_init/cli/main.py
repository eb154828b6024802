"""``fabric-init``: picks the command, runs it, turns our own exceptions into one line and an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from fabric_init.cli import CommandError, demo
from fabric_init.errors import FabricInitError

# A new command is one file beside this one and one entry here.
COMMANDS: dict[str, Callable[..., int]] = {"demo": demo.run}

_FAILED = 1
_HELP = {"help_option_names": ["-h", "--help"]}


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fabric-init {version('fabric-init')}")
        raise typer.Exit


def _about(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Give every tensor of a model its value exactly once: from a checkpoint, or by its own init code.

    `fabric-init COMMAND --help` explains one command.
    """


def build_app(commands: dict[str, Callable[..., int]] = COMMANDS) -> typer.Typer:
    """The commands as one application. A command's result is its exit status."""
    app = typer.Typer(
        no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False, context_settings=_HELP
    )
    app.callback()(_about)
    for name, run in commands.items():
        app.command(name)(_with_status(name, run))
    return app


def _with_status(name: str, run: Callable[..., int]) -> Callable[..., None]:
    @functools.wraps(run)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            status = run(*args, **kwargs)
        except (CommandError, FabricInitError) as error:
            print(f"fabric-init {name}: {error}", file=sys.stderr)
            status = _FAILED
        raise typer.Exit(status)

    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command, and exit: 0 for done, 1 for failed, with a line on stderr that says why, 2 for a wrong call."""
    build_app()(args=argv, prog_name="fabric-init")
