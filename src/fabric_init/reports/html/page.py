"""One page from plain data. What goes in is shown as text: nothing of it can become markup or code."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from fabric_init.reports.html.plots import Plot, compressed_plotly

Level = Literal["error", "warning", "note", "good"]
Cell = str | int | float | None | Sequence[str]
"""A text, a number, nothing, or several texts, of which the table shows how many and unfolds them."""


def in_short(number: int, unit: str = "") -> str:
    """A count in three digits: 39.2 M, or of bytes, 39.2 MB."""
    for size, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:,} {unit}".rstrip()


@dataclass(frozen=True)
class Fact:
    """A figure at the head of the page, with what it is of."""

    value: str
    label: str
    level: Level | None = None


@dataclass(frozen=True)
class Card:
    """Something to know: a finding, with what was seen and what to do about it.

    Attributes:
        level: its color, and the word it begins with.
        title: what it is, in a few words.
        about: the names of the tensors it is about.
        text: what was seen.
        fix: what to do.
    """

    level: Level
    title: str
    about: Sequence[str] = ()
    text: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: its heading.
        kind: how its cells are shown and sorted; a ``choice`` column can also be filtered by its values.
        hint: what it means, in a sentence.
    """

    title: str
    kind: Literal["text", "code", "choice", "number", "count", "bytes", "seconds", "list"] = "text"
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Rows to look through; any number of them. Columns in which no row has anything are left out."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Page:
    """A page: a title, facts, cards, plots, and a table, in this order.

    Attributes:
        title: what the page is about.
        subtitle: one sentence more.
        facts: the figures to see first.
        cards: what is to be read next.
        plots: made by :mod:`fabric_init.reports.html.plots`.
        table: everything, to sort and to search.
    """

    title: str
    subtitle: str
    table: Table
    facts: Sequence[Fact] = ()
    cards: Sequence[Card] = ()
    plots: Sequence[Plot] = field(default_factory=tuple)

    def html(self) -> str:
        """The whole page as one text, the plotting code in it.

        Raises:
            FabricInitError: the packages that pages are made with are not installed.
        """
        plotting = compressed_plotly()
        import jinja2  # comes with torch

        def part(name: str) -> str:
            return files(__package__).joinpath(name).read_text(encoding="utf-8")

        script = part("page.js")
        template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
            part("page.html")
        )
        return template.render(
            page=self,
            table=_plain_table(self.table),
            style=part("page.css"),
            script=script,
            # the browser runs this script and what it loads, and nothing else that may have got into the page
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            plotting=plotting,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`html` to ``path``."""
        Path(path).write_text(self.html(), encoding="utf-8", newline="\n")


def _plain_table(table: Table) -> dict[str, Any]:
    """The table as JSON has it, without columns in which no row has anything."""
    told = [i for i in range(len(table.columns)) if any(row[i] not in (None, "", []) for row in table.rows)]
    columns = [table.columns[i] for i in told]
    return {
        "columns": [{"title": one.title, "kind": one.kind, "hint": one.hint} for one in columns],
        "rows": [[_plain_cell(row[i]) for i in told] for row in table.rows],
    }


def _plain_cell(cell: Cell) -> Any:
    if isinstance(cell, float) and not math.isfinite(cell):
        return str(cell)  # JSON has no word for it
    return list(cell) if isinstance(cell, (tuple, list)) else cell
