"""What an audit finds, as plain frozen data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from fabric_init.reports.provenance import Write


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
        fix: what to do about it.
        std: the standard deviation that would bring it right, where there is one.
        loss_before: the first loss as it is.
        loss_after: the first loss with ``std`` applied.
    """

    level: Level
    check: str
    tensors: tuple[str, ...]
    evidence: str
    fix: str
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
class AuditResult:
    """The data of an :class:`~fabric_init.AuditReport`."""

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
