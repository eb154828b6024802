"""An audit as an HTML page: findings, plots, and every tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from fabric_init.reports.html import Bar, Card, Column, Fact, Page, Plot, Point, Table, bars, in_short, lines, scatter
from fabric_init.reports.html.page import Level as Color
from fabric_init.reports.provenance import wasted_by_rule
from fabric_init.tools.audit.findings import AuditReportData, AuditRow, Finding, Level

_COLORS: dict[str, Color] = {"error": "error", "warning": "warning", "note": "note"}

_COLUMNS = (
    Column("tensor", "code"),
    Column("finding", "choice", "the worst finding about it"),
    Column("shape"),
    Column("dtype", "choice"),
    Column("module", "choice", "the class of the module that holds it"),
    Column("rule", "code", "what had the last word on its value"),
    Column("line", "code", "where the model's code asked for that rule"),
    Column("mean", "number", "the mean that the rule gives"),
    Column("std", "number", "the standard deviation that the rule gives"),
    Column("full writes", "count", "how often all of it was written"),
    Column("wasted", "count", "elements that were written in vain"),
    Column("writes", "list", "every write, in order"),
)


def page_of(report: AuditReportData) -> Page:
    """``report`` as a page."""
    return Page(
        title=f"Init audit of {report.model}",
        subtitle="Who wrote every tensor, how often, and whether what came out is any good.",
        facts=list(_facts(report)),
        cards=[_card(finding) for finding in report.findings] or [Card("good", "Nothing found")],
        plots=list(_plots(report)),
        table=_table(report),
    )


def _facts(report: AuditReportData) -> Iterator[Fact]:
    yield Fact(f"{len(report.rows):,}", "tensors")
    yield Fact(in_short(sum(row.elements for row in report.rows)), "elements in them")
    levels = Counter(_color(finding.level) for finding in report.findings)
    for color in _COLORS.values():
        if count := levels[color]:
            yield Fact(f"{count}", f"{color}s" if count > 1 else color, color)
    if report.wasted_elements:
        yield Fact(in_short(report.wasted_elements), "elements written in vain", "warning")
        yield Fact(f"{report.wasted_seconds:.3g} s", "of work, on one thread", "warning")
    if report.first_loss is not None:
        yield Fact(f"{report.first_loss:.4g}", "first loss")
    if report.expected_loss is not None:
        yield Fact(f"{report.expected_loss:.4g}", "expected: ln(classes)")


def _color(level: Level) -> Color:
    return _COLORS[str(level)]


def _card(finding: Finding) -> Card:
    text = finding.evidence
    if finding.loss_before is not None and finding.loss_after is not None:
        text += f"\nFirst loss: {finding.loss_before:.4g} as it is, {finding.loss_after:.4g} once fixed."
    return Card(_color(finding.level), finding.check.replace("-", " "), finding.tensors, text, finding.fix)


def _plots(report: AuditReportData) -> Iterator[Plot]:
    if report.layers:
        yield lines(
            "Variance by layer",
            "A line that climbs or falls steadily means that signals explode or vanish with depth. Where the variance "
            "is zero or not finite, the line has a gap.",
            [f"{layer.name} ({layer.module_class})" for layer in report.layers],
            {
                "activations": [layer.activation_var for layer in report.layers],
                "gradients": [layer.gradient_var for layer in report.layers],
            },
            "variance",
        )
    if points := list(_points(report.rows)):
        yield scatter(
            "Std by tensor against expectation",
            "Weights of two or more dimensions, their inputs counted as torch.nn.init does; embeddings left out. On "
            "the line, what comes out of a layer varies as much as what goes in; far above it, signals grow.",
            points,
            "1 / √inputs",
            "std of its rule",
        )
    if wasted := wasted_by_rule((row.name, row.writes) for row in report.rows):
        yield bars(
            "Written in vain",
            "Elements that a rule wrote and a later one replaced before anything had read them.",
            [Bar(*each) for each in wasted],
            "elements",
        )


def _points(rows: tuple[AuditRow, ...]) -> Iterator[Point]:
    for row in rows:
        looked_up = row.module_class.endswith("Embedding") and not row.ties  # by row: nothing is added up
        std = row.std or 0.0
        if row.kind == "parameter" and len(row.shape) > 1 and row.elements and 0 < std < math.inf and not looked_up:
            said = f"{row.rule} at {row.place}" if row.place else row.rule
            inputs = math.prod(row.shape[1:])
            yield Point(1 / math.sqrt(inputs), std, row.rule.partition("(")[0], row.name, said)


def _table(report: AuditReportData) -> Table:
    worst: dict[str, Level] = {}
    for finding in report.findings:
        for name in finding.tensors:
            worst[name] = max(worst.get(name, finding.level), finding.level)
    return Table(
        _COLUMNS,
        [
            (
                ", ".join((row.name, *row.ties)),
                str(worst[row.name]) if row.name in worst else None,
                "×".join(map(str, row.shape)) or "scalar",
                row.dtype,
                row.module_class,
                row.rule,
                row.place,
                row.mean,
                row.std,
                row.full_writes,
                row.wasted_elements,
                [str(write) for write in row.writes],
            )
            for row in report.rows
        ],
    )
