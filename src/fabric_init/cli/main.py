"""``fabric-init``: choose the command, run it, turn our own exceptions into one line and an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fabric_init.cli import CommandError

# A new command is one file beside this one, with a function ``run``, and one entry here: the first line of that
# function's docstring. Its file is imported when it runs, since a shell that completes a command should not wait for
# torch.
COMMANDS = {
    "demo": "Finetune a small real model under a new head, and compare three ways of starting it.",
    "inspect": "Show what a checkpoint holds, and what is wrong with it.",
    "plan": "Show what a load would do and cost: no weight is read, no memory allocated, on any machine.",
    "audit": "Audit a model's init: which rule wrote each tensor, how often, with what result, and what looks wrong.",
}

Run = Callable[..., int]
"""The function of a command: it takes the command's arguments and returns the exit status."""

_FAILED = 1
_SETTINGS: dict[str, Any] = {
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


def load_run(name: str) -> Run:
    """Import and return the function of a command."""
    run: Run = import_module(f"fabric_init.cli.{name}").run
    return run


def _show_version(requested: bool) -> None:
    if requested:
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


def build_app(commands: Mapping[str, str] = COMMANDS, load: Callable[[str], Run] = load_run) -> typer.Typer:
    """Return the commands as one application.

    Args:
        commands: The name of each command, and its summary in one line.
        load: Returns the function of a command, by name; called when that command or its help is run.
    """

    class Commands(TyperGroup):
        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, known, rest = super().resolve_command(ctx, args)
            return name, known and build_command(known.name or "", load), rest

    app = typer.Typer(cls=Commands, no_args_is_help=True, **_SETTINGS)
    app.callback()(_about)
    for name, summary in commands.items():
        app.command(name, help=summary)(_nothing)
    return app


def _nothing() -> None:
    """Stand in for a command until it is chosen."""


def build_command(name: str, load: Callable[[str], Run] = load_run) -> Any:
    """Return the command that typer makes of its function."""
    app = typer.Typer(add_completion=False, **_SETTINGS)
    app.command(name)(_with_status(name, load(name)))
    return typer.main.get_command(app)


def _with_status(name: str, run: Run) -> Callable[..., None]:
    @functools.wraps(run)
    def command(*args: Any, **kwargs: Any) -> None:
        from fabric_init.errors import FabricInitError  # needs torch, as any command does

        try:
            status = run(*args, **kwargs)
        except (CommandError, FabricInitError) as error:
            print(f"fabric-init {name}: {error}", file=sys.stderr)
            status = _FAILED
        raise typer.Exit(status)

    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 on success, 1 on failure, with the reason on stderr, 2 for invalid arguments."""
    build_app()(args=argv, prog_name="fabric-init")
