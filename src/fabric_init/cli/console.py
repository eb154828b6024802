"""What the commands print with: consoles, one style of tables, and numbers as people read them.

A terminal gets colors (unless ``NO_COLOR`` is set) and tables cut to its width. A pipe or a file gets plain text, and
nothing of it is cut: it is read by other programs.
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

_UNCUT = 1_000_000
"""Columns of a pipe."""
_NO_SCALE = 10_000
"""Counts up to this are exact."""


def out() -> Console:
    """For results: standard output."""
    return _console(sys.stdout)


def err() -> Console:
    """For progress, and what is said on the way: standard error."""
    return _console(sys.stderr)


def _console(file: TextIO) -> Console:
    # Square brackets and numbers are data here, no markup and nothing to paint.
    return Console(file=file, width=None if is_terminal(file) else _UNCUT, markup=False, emoji=False, highlight=False)


def is_terminal(file: TextIO) -> bool:
    """Whether somebody looks at it. (``Console.is_terminal`` is also true of a pipe when ``FORCE_COLOR`` is set.)"""
    return file.isatty() and os.environ.get("TERM") != "dumb"


def new_table(console: Console, *columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table, with a line under its head on a terminal only.

    Args:
        console: what it will be printed on.
        columns: their titles.
        right: those that hold numbers, to be set flush right.
        title: a line above.
    """
    looked_at = is_terminal(console.file)  # type: ignore[arg-type]
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD if looked_at else None,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1 if looked_at else 2, 0, 0),  # the head's line brings a column of its own
        collapse_padding=True,
    )
    for column in columns:
        # Nothing is ever cut: a name that does not fit is continued below. Numbers keep to their line.
        number = column in right
        table.add_column(column, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def new_progress(wanted: bool = True) -> Progress:
    """A bar of bytes on standard error; nothing at all unless it is wanted and that is a terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=err(),
        transient=True,
        disable=not wanted or not is_terminal(sys.stderr),
    )


def count_text(count: int) -> str:
    """``70.6 B``: thousands K, millions M, billions B, trillions T. Up to 10,000 exactly: ``9,216``."""
    if count < _NO_SCALE:
        return f"{count:,}"
    unit, suffix = pick_unit_and_suffix(count, ["", "K", "M", "B", "T", "Q"], 1000)
    return f"{count / unit:.1f} {suffix}"


def printable(text: str) -> str:
    """Text from a file, safe for a terminal: control characters, which could move its cursor, are written out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
