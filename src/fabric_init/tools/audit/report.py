"""The result of an audit as plain frozen data."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from fabric_init._text import counted, joined, shape_text
from fabric_init.reports.provenance import Write
from fabric_init.reports.save import SavesItself, save_report
from fabric_init.tools.audit.findings import AuditReportData, AuditRow, Finding, Layer, Level

_MOST_ROWS = 30


@dataclass(frozen=True)
class AuditReport(AuditReportData):
    """The result of an audit of the init of a model. ``str()`` returns a readable text.

    Attributes:
        model: the class of the model.
        rows: one per tensor, in module order.
        findings: the worst first.
        layers: one per module, in the order of the forward pass; empty without a batch.
        first_loss: the loss of the first forward pass; ``None`` if there was none.
        expected_loss: ln(classes), the loss of a model that predicts all classes alike; ``None`` if unknown.
    """

    def count(self, level: Level) -> int:
        """Return the number of findings with this level."""
        return sum(finding.level is level for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON; numbers that are not finite become ``None``."""
        totals = {
            "worst": None if self.worst is None else str(self.worst),
            "counts": dict(Counter(str(finding.level) for finding in self.findings)),
            "wasted_elements": self.wasted_elements,
            "wasted_seconds": self.wasted_seconds,
        }
        plain: dict[str, Any] = _json_data(self)
        return {"model": plain.pop("model"), **totals, **plain}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report: a page with plots where ``path`` ends in ``.html``, :meth:`to_dict` as JSON otherwise.

        Raises:
            FabricInitError: a page is requested, but Plotly is not installed.
        """
        save_report(path, self.to_dict, self._page)

    def _page(self) -> SavesItself:
        from fabric_init.tools.audit.page import audit_page  # HTML is imported on request

        return audit_page(self)

    def summary(self) -> str:
        """Return the counts, in a few lines."""
        lines = [f"{self.model}: {len(self.rows)} tensors, {_count_levels(self.findings)}"]
        if self.wasted_elements:
            lines.append(
                f"overwritten before being read: {self.wasted_elements:,} elements, {self.wasted_seconds:.3g} s"
            )
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


def _count_levels(findings: tuple[Finding, ...]) -> str:
    counts = Counter(str(finding.level) for finding in findings)
    return ", ".join(counted(n, level) for level, n in counts.items()) or "nothing found"


def _json_data(value: Any) -> Any:
    if isinstance(value, Level):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_json_data(item) for item in value]
    if isinstance(value, (Write, AuditRow, Finding, Layer, AuditReport)):
        return {each.name: _json_data(getattr(value, each.name)) for each in fields(value)}
    return value
