"""What an audit found, as plain frozen data: :class:`AuditReport` and the records in it."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from fabric_init._text import counted, joined, shape_text
from fabric_init.reports.provenance import Write
from fabric_init.reports.save import SavesItself, save_report
from fabric_init.tools.audit.findings import AuditResult, Finding, Layer, Level, Row

_MOST_ROWS = 30


@dataclass(frozen=True)
class AuditReport(AuditResult):
    """What an audit found out about a model's init. ``str()`` gives a readable text.

    Attributes:
        model: the model's class.
        rows: one a tensor, in module order.
        findings: the worst first.
        layers: one a module, in the order of the forward pass; empty without a batch.
        first_loss: the loss of the first forward pass; ``None`` if there was none.
        expected_loss: the loss of a model that knows nothing yet, ln(classes); ``None`` if it cannot be told.
    """

    def count(self, level: Level) -> int:
        """How many findings have this level."""
        return sum(finding.level is level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for JSON; numbers that are not finite become ``None``."""
        totals = {
            "worst": None if self.worst is None else str(self.worst),
            "counts": dict(Counter(str(finding.level) for finding in self.findings)),
            "wasted_elements": self.wasted_elements,
            "wasted_seconds": self.wasted_seconds,
        }
        plain: dict[str, Any] = _plain(self)
        return {"model": plain.pop("model"), **totals, **plain}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report: a page with plots where ``path`` ends in ``.html``, :meth:`to_dict` as JSON otherwise.

        Raises:
            FabricInitError: a page is asked for, and Plotly is not installed.
        """
        save_report(path, self.to_dict, self._page)

    def _page(self) -> SavesItself:
        from fabric_init.tools.audit.page import page_of  # HTML is only for whoever wants a page

        return page_of(self)

    def summary(self) -> str:
        """The counts, in one line or a few."""
        lines = [f"{self.model}: {len(self.rows)} tensors, {_counted(self.findings)}"]
        if self.wasted_elements:
            lines.append(f"written in vain: {self.wasted_elements:,} elements, {self.wasted_seconds:.3g} s")
        if self.first_loss is not None:
            expected = "" if self.expected_loss is None else f", {self.expected_loss:.4g} expected"
            lines.append(f"first loss: {self.first_loss:.4g}{expected}")
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [self.summary()]
        for finding in self.findings:
            lines.append(f"{finding.level} [{finding.check}] {joined(finding.tensors, most=3)}")
            lines += [f"    {finding.evidence}", f"    → {finding.fix}"]
        shown = self.rows[:_MOST_ROWS]
        width = max((len(row.name) for row in shown), default=0)
        for row in shown:
            shape = shape_text(row.shape)
            std = "?" if row.std is None else f"{row.std:.4g}"
            lines.append(f"  {row.name:<{width}} {shape:>12}  std {std:<9} {row.rule} {row.place}".rstrip())
        if len(self.rows) > len(shown):
            lines.append(f"  … and {len(self.rows) - len(shown)} more (.rows has all)")
        return "\n".join(lines)


def _counted(findings: tuple[Finding, ...]) -> str:
    counts = Counter(str(finding.level) for finding in findings)
    return ", ".join(counted(n, level) for level, n in counts.items()) or "nothing found"


def _plain(value: Any) -> Any:
    if isinstance(value, Level):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, (Write, Row, Finding, Layer, AuditReport)):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return value
