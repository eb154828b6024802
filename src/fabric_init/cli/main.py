"""``fabric-init``: picks the command, runs it, turns our own exceptions into one line and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fabric_init.cli import Command, CommandError, demo
from fabric_init.errors import FabricInitError

# A new command is one file beside this one and one entry here.
COMMANDS: tuple[Command, ...] = (demo.COMMAND,)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fabric-init",
        description="Give every tensor of a model its value exactly once: from a checkpoint, or by its own init code.",
        epilog="`fabric-init COMMAND --help` explains one command.",
    )
    parser.add_argument("--version", action="version", version=f"fabric-init {version('fabric-init')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: it failed, with a line on stderr that says why; 2: called the wrong way."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (CommandError, FabricInitError) as error:
        print(f"fabric-init {arguments.command}: {error}", file=sys.stderr)
        return 1
    return status
