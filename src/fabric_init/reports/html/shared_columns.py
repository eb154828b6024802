"""The parts that the page of an init report and the page of an audit share: columns, and the plot of dead writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from fabric_init.reports.html.page import Cell, Column, Table
from fabric_init.reports.html.plots import Bar, Plot, bars
from fabric_init.reports.provenance import wasted_by_rule
from fabric_init.reports.rows import TensorTrace

RowT_contra = TypeVar("RowT_contra", bound=TensorTrace, contravariant=True)
RowT = TypeVar("RowT", bound=TensorTrace)


@dataclass(frozen=True)
class RowColumn(Generic[RowT_contra]):
    """A column, and how a row fills its cell."""

    column: Column
    cell: Callable[[RowT_contra], Cell]


NAME = RowColumn[TensorTrace](Column("tensor", "code"), lambda row: ", ".join((row.name, *row.ties)))
SHAPE = RowColumn[TensorTrace](Column("shape"), lambda row: "×".join(map(str, row.shape)) or "scalar")
DTYPE = RowColumn[TensorTrace](Column("dtype", "choice"), lambda row: row.dtype)
MEAN = RowColumn[TensorTrace](Column("mean expected", "number", "the mean under the init rule"), lambda row: row.mean)
STD = RowColumn[TensorTrace](
    Column("std expected", "number", "the standard deviation under the init rule"), lambda row: row.std
)
FULL_WRITES = RowColumn[TensorTrace](
    Column("full writes", "count", "how often plain PyTorch writes all elements"), lambda row: row.full_writes
)
WASTED = RowColumn[TensorTrace](
    Column("wasted", "count", "elements that plain PyTorch writes and overwrites before they are read (dead writes)"),
    lambda row: row.wasted_elements,
)
WRITES = RowColumn[TensorTrace](
    Column("writes", "list", "every write of plain PyTorch, in order"), lambda row: [str(write) for write in row.writes]
)


def table_of(columns: Iterable[RowColumn[RowT]], rows: Iterable[RowT]) -> Table:
    """Return a table of ``rows``."""
    columns = tuple(columns)
    return Table([each.column for each in columns], [[each.cell(row) for each in columns] for row in rows])


def dead_writes(rows: Iterable[TensorTrace], title: str, text: str) -> Iterator[Plot]:
    """Yield a plot of the dead writes by rule, if there are any."""
    if wasted := wasted_by_rule((row.name, row.writes) for row in rows):
        yield bars(title, text, [Bar(*each) for each in wasted], "elements")
