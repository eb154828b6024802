"""Print the report of an audit as text and tables, for ``fabric-init audit``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fabric_init._text import joined, shape_text
from fabric_init.cli.console import new_table, out
from fabric_init.tools.audit.findings import AuditRow, Finding, Level
from fabric_init.tools.audit.report import AuditReport

_COLORS = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.NOTE: "cyan"}
_NAMES = 3  # tensors shown for a finding
_NARROW = 120  # columns of a terminal below which rules and lines do not fit beside names


def show(report: AuditReport, most_rows: int) -> None:
    """Print the findings of ``report`` on standard output, and at most ``most_rows`` tensors before them."""
    console = out()
    if most_rows and report.rows:
        console.print(_tensor_table(console, report.rows[:most_rows]))
        if len(report.rows) > most_rows:
            console.print(f"… and {len(report.rows) - most_rows} more: --rows, or --json")
        console.print()
    for finding in report.findings:
        console.print(_finding_text(finding))
    console.print(report.summary())


def _tensor_table(console: Console, rows: tuple[AuditRow, ...]) -> Table:
    narrow = console.width < _NARROW
    texts, numbers = ("tensor", "rule", "at"), ("shape", "mean", "std", "writes")
    heads = ("tensor, rule and line",) if narrow else texts
    table = new_table(console, *heads, *numbers, right=numbers, title="What each tensor gets")
    for row in rows:
        origin = (row.name, row.rule or "nothing", row.place)
        cells = ("\n  ".join(filter(None, origin)),) if narrow else origin
        cells = (*cells, shape_text(row.shape), _number(row.mean), _number(row.std), f"{row.full_writes}×")
        table.add_row(*map(Text, cells))
    return table


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _finding_text(finding: Finding) -> Text:
    text = Text.assemble(
        (str(finding.level), _COLORS[finding.level]),
        f" [{finding.check}] ",
        (joined(finding.tensors, _NAMES), "bold"),
        f"\n    {finding.evidence}",
    )
    if finding.std is not None:
        text.append(f"\n    std that fixes it: {finding.std:.4g}")
    if finding.loss_before is not None and finding.loss_after is not None:
        text.append(f"; first loss {finding.loss_before:.4g}, with it {finding.loss_after:.4g}")
    text.append(f"\n    → {finding.fix}\n")
    return text
