"""One page from plain data, all of which is escaped: none of it can become markup or code."""

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

CardLevel = Literal["error", "warning", "note", "good"]
Cell = str | int | float | None | Sequence[str]
"""A text, a number, nothing, or several texts, which the table shows as a count that unfolds."""


def in_short(number: int, unit: str = "") -> str:
    """Return a count in three digits: 39.2 M, or 39.2 MB for bytes."""
    for size, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:,} {unit}".rstrip()


@dataclass(frozen=True)
class Fact:
    """A figure at the head of the page, and its label."""

    value: str
    label: str
    level: CardLevel | None = None


@dataclass(frozen=True)
class Card:
    """A finding: what was observed, and how to fix it.

    Attributes:
        level: its color and first word.
        title: the problem in a few words.
        about: the names of the tensors that it concerns.
        text: the observation.
        fix: how to fix it.
    """

    level: CardLevel
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
        hint: its meaning, in a sentence.
    """

    title: str
    kind: Literal["text", "code", "choice", "number", "count", "bytes", "seconds", "list"] = "text"
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Any number of rows. Columns that are empty in all rows are omitted."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Page:
    """A page: a title, facts, cards, plots, and a table, in this order.

    Attributes:
        title: what the page is about.
        subtitle: one more sentence.
        facts: the figures to see first.
        cards: the findings.
        plots: made by :mod:`fabric_init.reports.html.plots`.
        table: all rows, to sort and search.
    """

    title: str
    subtitle: str
    table: Table
    facts: Sequence[Fact] = ()
    cards: Sequence[Card] = ()
    plots: Sequence[Plot] = field(default_factory=tuple)

    def html(self) -> str:
        """Return the page as one text, with the plotting code.

        Raises:
            FabricInitError: the packages that make pages are not installed.
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
    """Return the table as JSON data, without columns that are empty in all rows."""
    shown = [i for i in range(len(table.columns)) if any(row[i] not in (None, "", []) for row in table.rows)]
    columns = [table.columns[i] for i in shown]
    return {
        "columns": [{"title": each.title, "kind": each.kind, "hint": each.hint} for each in columns],
        "rows": [[_plain_cell(row[i]) for i in shown] for row in table.rows],
    }


def _plain_cell(cell: Cell) -> Any:
    if isinstance(cell, float) and not math.isfinite(cell):
        return str(cell)  # JSON cannot represent it
    return list(cell) if isinstance(cell, (tuple, list)) else cell
