"""An init report as an HTML page: the origin of every value, and how it compares with its init rule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from fabric_init._text import counted
from fabric_init.reports.html import Bar, Card, Column, Fact, Page, Plot, Point, bars, in_short, scatter
from fabric_init.reports.html.shared_columns import (
    DTYPE,
    FULL_WRITES,
    MEAN,
    NAME,
    SHAPE,
    STD,
    WASTED,
    WRITES,
    RowColumn,
    dead_writes,
    table_of,
)
from fabric_init.reports.rows import InitReportData, InitRow

_COLUMNS: tuple[RowColumn[InitRow], ...] = (
    NAME,
    RowColumn(Column("status", "choice", "how the tensor got its value"), lambda row: row.status),
    RowColumn(
        Column("from", "code", "the checkpoint key, or the init rule and the line that called it"),
        lambda row: row.origin if row.cast_from is None else f"{row.origin} (cast from {row.cast_from})",
    ),
    SHAPE,
    DTYPE,
    RowColumn(Column("size", "bytes"), lambda row: row.nbytes),
    STD,
    RowColumn(
        Column("std now", "number", "the standard deviation of the values in memory when they were measured"),
        lambda row: row.std_now,
    ),
    FULL_WRITES,
    WASTED,
    WRITES,
    MEAN,
    RowColumn(
        Column("mean now", "number", "the mean of the values in memory when they were measured"),
        lambda row: row.mean_now,
    ),
    RowColumn(Column("kind", "choice"), lambda row: row.kind),
)


def init_page(report: InitReportData) -> Page:
    """Return ``report`` as a page."""
    return Page(
        title="Init report",
        subtitle=_source(report),
        facts=list(_init_facts(report)),
        cards=list(_cards(report)),
        plots=list(_init_plots(report)),
        table=table_of(_COLUMNS, report.rows),
    )


def _source(report: InitReportData) -> str:
    if report.checkpoint is None:
        return "How each tensor got its value."
    return f"How each tensor got its value. Loaded from {report.checkpoint}" + (
        f" ({report.note})." if report.note else "."
    )


def _init_facts(report: InitReportData) -> Iterator[Fact]:
    yield Fact(f"{len(report.rows):,}", "tensors")
    yield Fact(in_short(sum(row.nbytes for row in report.rows), "B"), "in total")
    for status, count in Counter(row.status for row in report.rows).most_common():
        yield Fact(f"{count:,}", status, "error" if status == "unfilled" else None)
    if wasted := sum(row.wasted_elements or 0 for row in report.rows):
        yield Fact(in_short(wasted), "elements of dead writes saved", "good")


def _cards(report: InitReportData) -> Iterator[Card]:
    if unfilled := [row.name for row in report.rows if row.status == "unfilled"]:
        yield Card(
            "error",
            f"no values yet: {counted(len(unfilled), 'tensor')}",
            unfilled,
            fix="Load them, or call fabric.init_missing(model).",
        )
    if report.not_finite:
        yield Card("error", f"NaN or infinity in {counted(len(report.not_finite), 'tensor')}", report.not_finite)
    if report.unexpected:
        title = f"ignored: {counted(len(report.unexpected), 'key')} of the checkpoint"
        yield Card("note", title, report.unexpected, "The model has no tensors of these names.")
    for cast, count in Counter(f"{row.cast_from} → {row.dtype}" for row in report.rows if row.cast_from).items():
        yield Card("note", f"cast: {counted(count, 'tensor')}, {cast}")


def _init_plots(report: InitReportData) -> Iterator[Plot]:
    tensors, sizes = Counter[str](row.status for row in report.rows), Counter[str]()
    for row in report.rows:
        sizes[row.status] += row.nbytes
    yield bars(
        "Where the values came from",
        "Bytes by status of the tensors.",
        [Bar(status, size, counted(tensors[status], "tensor")) for status, size in sizes.items()],
        "bytes",
        unit="B",
    )
    if points := list(_init_points(report.rows)):
        yield scatter(
            "Std by tensor against expectation",
            "Tensors that the model's own code initialized. On the line, the values in memory have the standard "
            "deviation of their rule.",
            points,
            "std of its rule",
            "std now",
        )
    yield from dead_writes(
        report.rows,
        "Writes saved",
        "Elements that plain PyTorch writes and overwrites before they are read.",
    )


def _init_points(rows: tuple[InitRow, ...]) -> Iterator[Point]:
    for row in rows:
        if row.std and row.std_now and math.isfinite(row.std_now):
            yield Point(row.std, row.std_now, row.rule.partition("(")[0], row.name, row.origin)
