"""Output of the commands: consoles, tables, progress bars and numbers.

A terminal gets colors (unless ``NO_COLOR`` is set) and tables of its width. A pipe or a file gets plain text in full,
since other programs read it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

_PIPE_WIDTH = 1_000_000  # columns: never wraps
_MOST_EXACT = 10_000  # counts below this are written in full


def out() -> Console:
    """Return a console for results, on standard output."""
    return _console(sys.stdout)


def err() -> Console:
    """Return a console for progress and messages, on standard error."""
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
    # Square brackets and numbers are data here: no markup, no highlighting.
    return Console(
        file=file, width=None if is_terminal(file) else _PIPE_WIDTH, markup=False, emoji=False, highlight=False
    )


def is_terminal(file: TextIO) -> bool:
    """Return whether ``file`` is a terminal. (``Console.is_terminal`` is true of a pipe if ``FORCE_COLOR`` is set.)"""
    return file.isatty() and os.environ.get("TERM") != "dumb"


def new_table(console: Console, *columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """Return an empty table, with a line under its head on a terminal only.

    Args:
        console: The console that it will be printed on.
        columns: The titles of the columns.
        right: The titles of those with numbers, which are aligned right.
        title: A line above the table.
    """
    on_terminal = is_terminal(console.file)  # type: ignore[arg-type]
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD if on_terminal else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if on_terminal else 2, 0, 0),  # the head's line brings a column of its own
        collapse_padding=True,
    )
    for column in columns:
        # Nothing is cut: a name that does not fit continues on the next line. Numbers do not wrap.
        number = column in right
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def new_progress(enabled: bool = True) -> Progress:
    """Return a progress bar in bytes on standard error; disabled unless ``enabled`` and that is a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err(),
        transient=True,
        disable=not enabled or not is_terminal(sys.stderr),
    )


def count_text(count: int) -> str:
    """Return ``9,216``, ``10.0 K``, ``70.6 B``: exact below 10,000, then in thousands, millions and so on."""
    if count < _MOST_EXACT:
        return f"{count:,}"
    unit, suffix = pick_unit_and_suffix(count, ["", "K", "M", "B", "T", "Q"], 1000)
    return f"{count / unit:.1f} {suffix}"


def printable(text: str) -> str:
    """Return ``text`` with control characters escaped: from an untrusted file, they could change the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
