"""What an audit found, as plain frozen data: :class:`AuditReport` and the records in it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

from fabric_init.auditing.page import page_of
from fabric_init.filling.writes import Write
from fabric_init.pages import is_page

_MOST_ROWS = 30


class Level(IntEnum):
    """How bad a finding is; levels compare."""

    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Row:
    """One tensor of the model: the rule that won, and everything that was written on the way.

    Attributes:
        name: the tensor's name in the model; ties share the row of the first name.
        shape: its shape.
        dtype: its dtype, such as ``float32``.
        module_class: the class of the module that holds it.
        rule: the rule that had the last word; empty if none wrote it.
        file: where the model's code asked for that rule.
        line: the line in ``file``.
        mean: the value's expected mean; ``None`` if it cannot be told.
        std: the value's expected standard deviation; ``None`` if it cannot be told.
        writes: every write, in order.
        full_writes: how many of them wrote all of it.
        wasted_elements: elements written in vain.
        wasted_seconds: what those writes cost in plain PyTorch on this machine's CPU: measured on samples.
        kind: ``parameter`` or ``buffer``.
        ties: the tensor's other names.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    module_class: str
    rule: str
    file: str | None
    line: int | None
    mean: float | None
    std: float | None
    writes: tuple[Write, ...]
    full_writes: int
    wasted_elements: int
    wasted_seconds: float
    kind: str = "parameter"
    ties: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def place(self) -> str:
        """``file:line`` of the winning rule, or an empty text."""
        return f"{self.file}:{self.line}" if self.file else ""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or looks like it.

    Attributes:
        level: how bad it is.
        check: which check found it, such as ``never-written``.
        tensors: the names of the tensors (or modules) it is about.
        evidence: what was seen.
        mend: what to do about it.
        std: the standard deviation that would bring it right, where there is one.
        loss_before: the first loss as it is.
        loss_after: the first loss with ``std`` applied.
    """

    level: Level
    check: str
    tensors: tuple[str, ...]
    evidence: str
    mend: str
    std: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass(frozen=True)
class Layer:
    """One module in one forward and backward pass: moments over all elements of its output, and of that gradient."""

    name: str
    module_class: str
    activation_mean: float | None
    activation_var: float | None
    gradient_mean: float | None
    gradient_var: float | None


@dataclass(frozen=True)
class AuditReport:
    """What an audit found out about a model's init. ``str()`` gives a readable text.

    Attributes:
        model: the model's class.
        rows: one a tensor, in module order.
        findings: the worst first.
        layers: one a module, in the order of the forward pass; empty without a batch.
        first_loss: the loss of the first forward pass; ``None`` if there was none.
        expected_loss: the loss of a model that knows nothing yet, ln(classes); ``None`` if it cannot be told.
    """

    model: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()
    layers: tuple[Layer, ...] = ()
    first_loss: float | None = None
    expected_loss: float | None = None

    @property
    def worst(self) -> Level | None:
        """The highest level of the findings; ``None`` without any."""
        return max((finding.level for finding in self.findings), default=None)

    @property
    def wasted_elements(self) -> int:
        """Elements written in vain, over all tensors."""
        return sum(row.wasted_elements for row in self.rows)

    @property
    def wasted_seconds(self) -> float:
        """What plain PyTorch spends on them on this machine's CPU, measured on samples."""
        return sum(row.wasted_seconds for row in self.rows)

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
        if is_page(path):
            page_of(self).save(path)
        else:
            Path(path).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

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
            lines.append(f"{finding.level} [{finding.check}] {', '.join(finding.tensors[:3])}{_more(finding.tensors)}")
            lines += [f"    {finding.evidence}", f"    → {finding.mend}"]
        shown = self.rows[:_MOST_ROWS]
        width = max((len(row.name) for row in shown), default=0)
        for row in shown:
            shape = "×".join(map(str, row.shape)) or "scalar"
            std = "?" if row.std is None else f"{row.std:.4g}"
            lines.append(f"  {row.name:<{width}} {shape:>12}  std {std:<9} {row.rule} {row.place}".rstrip())
        if len(self.rows) > len(shown):
            lines.append(f"  … and {len(self.rows) - len(shown)} more (.rows has all)")
        return "\n".join(lines)


def _more(names: tuple[str, ...]) -> str:
    return f" … ({len(names)} tensors)" if len(names) > 3 else ""


def _counted(findings: tuple[Finding, ...]) -> str:
    counts = Counter(str(finding.level) for finding in findings)
    return ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in counts.items()) or "nothing found"


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
