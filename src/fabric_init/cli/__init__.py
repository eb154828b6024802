"""The command line: ``fabric-init COMMAND``. One file a command; each ends in a :class:`Command` named ``COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What ``main`` has to know about one subcommand.

    ``main`` calls ``add_arguments`` once for every command at each start, so that must be cheap; then ``run`` of the
    chosen one, whose result is the exit status.
    """

    name: str
    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


class CommandError(Exception):
    """A command cannot go on, for a reason the user can mend. ``main`` prints it as one line, without a traceback."""
