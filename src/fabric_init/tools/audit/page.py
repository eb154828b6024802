"""An audit as an HTML page: findings, plots, and every tensor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from fabric_init.reports.html import Card, Column, Fact, Page, Plot, Point, Table, in_short, lines, scatter
from fabric_init.reports.html.page import CardLevel
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
from fabric_init.tools.audit.findings import AuditReportData, AuditRow, Finding, Level

_CARD_LEVELS: dict[str, CardLevel] = {"error": "error", "warning": "warning", "note": "note"}


def audit_page(report: AuditReportData) -> Page:
    """Return ``report`` as a page."""
    return Page(
        title=f"Init audit of {report.model}",
        subtitle="How each tensor is written, how often, and what looks wrong.",
        facts=list(_audit_facts(report)),
        cards=[_card(finding) for finding in report.findings] or [Card("good", "Nothing found")],
        plots=list(_audit_plots(report)),
        table=_table(report),
    )


def _audit_facts(report: AuditReportData) -> Iterator[Fact]:
    yield Fact(f"{len(report.rows):,}", "tensors")
    yield Fact(in_short(sum(row.elements for row in report.rows)), "elements in them")
    levels = Counter(_card_level(finding.level) for finding in report.findings)
    for level in _CARD_LEVELS.values():
        if count := levels[level]:
            yield Fact(f"{count}", f"{level}s" if count > 1 else level, level)
    if report.wasted_elements:
        yield Fact(in_short(report.wasted_elements), "elements of dead writes", "warning")
        yield Fact(f"{report.wasted_seconds:.3g} s", "spent on them, on one thread", "warning")
    if report.first_loss is not None:
        yield Fact(f"{report.first_loss:.4g}", "first loss")
    if report.expected_loss is not None:
        yield Fact(f"{report.expected_loss:.4g}", "expected: ln(classes)")


def _card_level(level: Level) -> CardLevel:
    return _CARD_LEVELS[str(level)]


def _card(finding: Finding) -> Card:
    text = finding.evidence
    if finding.loss_before is not None and finding.loss_after is not None:
        text += f"\nFirst loss: {finding.loss_before:.4g} as it is, {finding.loss_after:.4g} once fixed."
    return Card(_card_level(finding.level), finding.check.replace("-", " "), finding.tensors, text, finding.fix)


def _audit_plots(report: AuditReportData) -> Iterator[Plot]:
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
    if points := list(_audit_points(report.rows)):
        yield scatter(
            "Std by tensor against expectation",
            "Weights of two or more dimensions without embeddings; inputs are counted as in torch.nn.init. On the "
            "line, the output of a layer has the variance of its input; far above it, signals grow.",
            points,
            "1 / √inputs",
            "std of its rule",
        )
    yield from dead_writes(
        report.rows, "Dead writes", "Elements that a rule wrote and a later one overwrote before they were read."
    )


def _audit_points(rows: tuple[AuditRow, ...]) -> Iterator[Point]:
    for row in rows:
        is_lookup = row.module_class.endswith("Embedding") and not row.ties  # by row, without a sum over inputs
        std = row.std or 0.0
        if row.kind == "parameter" and len(row.shape) > 1 and row.elements and 0 < std < math.inf and not is_lookup:
            rule = f"{row.rule} at {row.place}" if row.place else row.rule
            inputs = math.prod(row.shape[1:])
            yield Point(1 / math.sqrt(inputs), std, row.rule.partition("(")[0], row.name, rule)


def _table(report: AuditReportData) -> Table:
    worst: dict[str, Level] = {}
    for finding in report.findings:
        for name in finding.tensors:
            worst[name] = max(worst.get(name, finding.level), finding.level)
    columns: tuple[RowColumn[AuditRow], ...] = (
        NAME,
        RowColumn(
            Column("finding", "choice", "the worst finding about it"),
            lambda row: str(worst[row.name]) if row.name in worst else None,
        ),
        SHAPE,
        DTYPE,
        RowColumn(Column("module", "choice", "the class of the module that holds it"), lambda row: row.module_class),
        RowColumn(Column("rule", "code", "the init rule that determined its value"), lambda row: row.rule),
        RowColumn(Column("line", "code", "the line of the model that called that rule"), lambda row: row.place),
        MEAN,
        STD,
        FULL_WRITES,
        WASTED,
        WRITES,
    )
    return table_of(columns, report.rows)
