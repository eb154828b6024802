"""``fabric-init audit``: is the init of a model any good?"""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fabric_init.auditing.audit import audit
from fabric_init.auditing.report import AuditReport, Finding, Level, Row
from fabric_init.cli.model_argument import HELP, model_builder

_COLOURS = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.NOTE: "cyan"}
_NAMES = 3  # of the tensors that a finding is about
_FOUND = 1


class FailOn(str, Enum):
    """The lowest level that makes the exit status 1."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"
    NEVER = "never"


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    batch: Annotated[
        bool,
        typer.Option(
            help="Also run the model once, forward and backward, on a batch that is made up: this takes its memory."
        ),
    ] = False,
    fail_on: Annotated[
        FailOn, typer.Option(help="Exit with status 1 if there is a finding of this level, or a worse one.")
    ] = FailOn.ERROR,
    rows: Annotated[int, typer.Option(min=0, help="How many tensors to list; findings are all shown.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, with every tensor.")] = False,
) -> int:
    """Audit a model's init: which rule wrote each tensor, how often, with what result, and what looks wrong.

    The model is recorded, not built: no weight memory is taken, so its size does not matter.

    Errors are tensors that nobody initialises, and a first loss far from ln(classes). Warnings are rules that undo each
    other, weights that are initialised several times, and layers that were forgotten. Notes are worth knowing.

    `fabric-init audit my_package.models:build --fail-on warning` is a check for CI.
    """
    report = audit(model_builder(model), batch="auto" if batch else None)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        _show(report, rows, Console())
    failing = fail_on is not FailOn.NEVER and report.worst is not None and report.worst >= Level[fail_on.name]
    return _FOUND if failing else 0


def _show(report: AuditReport, most_rows: int, console: Console) -> None:
    if most_rows and report.rows:
        console.print(_tensor_table(report.rows[:most_rows]))
        if len(report.rows) > most_rows:
            console.print(f"… and {len(report.rows) - most_rows} more: --rows, or --json")
    for finding in report.findings:
        console.print(_finding_text(finding))
    console.print(report.summary(), highlight=False)


def _tensor_table(rows: tuple[Row, ...]) -> Table:
    table = Table(title="What each tensor gets", title_justify="left")
    for column in ("tensor", "rule", "at"):
        table.add_column(column, overflow="fold")
    for column in ("shape", "mean", "std", "writes"):
        table.add_column(column, justify="right")
    for row in rows:
        shape = "×".join(map(str, row.shape)) or "scalar"
        plain = (row.name, row.rule or "nothing", row.place, shape, _number(row.mean), _number(row.std))
        table.add_row(*map(Text, plain), Text(f"{row.full_writes}×"))
    return table


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _finding_text(finding: Finding) -> Text:
    more = len(finding.tensors) - _NAMES
    text = Text.assemble(
        (str(finding.level), _COLOURS[finding.level]),
        f" [{finding.check}] ",
        (", ".join(finding.tensors[:_NAMES]), "bold"),
        f" … and {more} more" if more > 0 else "",
        f"\n    {finding.evidence}",
    )
    if finding.std is not None:
        text.append(f"\n    std that brings it right: {finding.std:.4g}")
    if finding.loss_before is not None and finding.loss_after is not None:
        text.append(f"; first loss {finding.loss_before:.4g}, with it {finding.loss_after:.4g}")
    text.append(f"\n    → {finding.mend}\n")
    return text
