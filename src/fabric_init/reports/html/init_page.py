"""An init report as an HTML page: where every value came from, and whether it is what its rule promised."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from fabric_init._text import counted
from fabric_init.reports.html import Bar, Card, Column, Fact, Page, Plot, Point, Table, bars, in_short, scatter
from fabric_init.reports.provenance import wasted_by_rule
from fabric_init.reports.rows import InitRecord, Row

_COLUMNS = (
    Column("tensor", "code"),
    Column("status", "choice", "what it got"),
    Column("from", "code", "the checkpoint's key, or the rule that initialized it and the line that asked for it"),
    Column("shape"),
    Column("dtype", "choice"),
    Column("size", "bytes"),
    Column("std expected", "number", "the standard deviation that its rule gives"),
    Column("std now", "number", "the standard deviation of what is in memory, when it was measured"),
    Column("full writes", "count", "how often plain PyTorch would have written all of it"),
    Column("wasted", "count", "elements that plain PyTorch would have written in vain"),
    Column("writes", "list", "what plain PyTorch would have written, in order"),
    Column("mean expected", "number", "the mean that its rule gives"),
    Column("mean now", "number", "the mean of what is in memory, when it was measured"),
    Column("kind", "choice"),
)


def page_of(report: InitRecord) -> Page:
    """``report`` as a page."""
    return Page(
        title="Init report",
        subtitle=_source(report),
        facts=list(_facts(report)),
        cards=list(_cards(report)),
        plots=list(_plots(report)),
        table=Table(_COLUMNS, [_cells(row) for row in report.rows]),
    )


def _source(report: InitRecord) -> str:
    if report.checkpoint is None:
        return "What every tensor got, from where."
    return f"What every tensor got, from where. Loaded from {report.checkpoint}" + (
        f" ({report.note})." if report.note else "."
    )


def _facts(report: InitRecord) -> Iterator[Fact]:
    yield Fact(f"{len(report.rows):,}", "tensors")
    yield Fact(in_short(sum(row.nbytes for row in report.rows), "B"), "in all")
    for status, count in Counter(row.status for row in report.rows).most_common():
        yield Fact(f"{count:,}", status, "error" if status == "unfilled" else None)
    if wasted := sum(row.wasted_elements or 0 for row in report.rows):
        yield Fact(in_short(wasted), "elements not written in vain", "good")


def _cards(report: InitRecord) -> Iterator[Card]:
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


def _plots(report: InitRecord) -> Iterator[Plot]:
    tensors, sizes = Counter[str](row.status for row in report.rows), Counter[str]()
    for row in report.rows:
        sizes[row.status] += row.nbytes
    yield bars(
        "Where the values came from",
        "Bytes, by what the tensors got.",
        [Bar(status, size, counted(tensors[status], "tensor")) for status, size in sizes.items()],
        "bytes",
        unit="B",
    )
    if points := list(_points(report.rows)):
        yield scatter(
            "Std by tensor against expectation",
            "Tensors that the model's own code initialized. On the line, the values in memory vary as much as the "
            "rule promised.",
            points,
            "std of its rule",
            "std now",
        )
    if wasted := wasted_by_rule((row.name, row.writes) for row in report.rows):
        yield bars(
            "Writes saved",
            "Elements that plain PyTorch would have written and then replaced, before anything had read them.",
            [Bar(*each) for each in wasted],
            "elements",
        )


def _points(rows: list[Row]) -> Iterator[Point]:
    for row in rows:
        if row.std and row.std_now and math.isfinite(row.std_now):
            yield Point(row.std, row.std_now, row.rule.partition("(")[0], row.name, row.origin)


def _cells(row: Row) -> tuple[str | int | float | list[str] | None, ...]:
    return (
        ", ".join((row.name, *row.ties)),
        row.status,
        row.origin if row.cast_from is None else f"{row.origin} (cast from {row.cast_from})",
        "×".join(map(str, row.shape)) or "scalar",
        row.dtype,
        row.nbytes,
        row.std,
        row.std_now,
        row.full_writes,
        row.wasted_elements,
        [str(write) for write in row.writes],
        row.mean,
        row.mean_now,
        row.kind,
    )
