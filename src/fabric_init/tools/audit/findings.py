"""The rows and findings of an audit, as plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from fabric_init.reports.rows import TensorTrace


class Level(IntEnum):
    """The severity of a finding; levels can be compared."""

    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, kw_only=True)
class AuditRow(TensorTrace):
    """One tensor of an audit: its trace, the module that holds it, and the cost of its dead writes.

    Attributes:
        module_class: the class of the module that holds the tensor.
        wasted_seconds: the time that plain PyTorch spends on the dead writes on the CPU of this machine, measured on
            samples.
    """

    module_class: str
    wasted_seconds: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A problem, or a likely one.

    Attributes:
        level: its severity.
        check: the check that reports it, such as ``never-written``.
        tensors: the names of the tensors or modules that it concerns.
        evidence: what the check observed.
        fix: how to fix it.
        std: the standard deviation that would fix it, if one does.
        loss_before: the first loss without the fix.
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
    """One module in one forward and backward pass: the moments of its output, and of the gradient of that output."""

    name: str
    module_class: str
    activation_mean: float | None
    activation_var: float | None
    gradient_mean: float | None
    gradient_var: float | None


@dataclass(frozen=True)
class AuditReportData:
    """The fields of an :class:`~fabric_init.AuditReport`, apart from it so that its page does not import it."""

    model: str
    rows: tuple[AuditRow, ...]
    findings: tuple[Finding, ...] = ()
    layers: tuple[Layer, ...] = ()
    first_loss: float | None = None
    expected_loss: float | None = None

    @property
    def worst(self) -> Level | None:
        """The highest level of the findings; ``None`` if there are none."""
        return max((finding.level for finding in self.findings), default=None)

    @property
    def wasted_elements(self) -> int:
        """Elements of all tensors that were overwritten before being read (dead writes)."""
        return sum(row.wasted_elements or 0 for row in self.rows)

    @property
    def wasted_seconds(self) -> float:
        """The time that plain PyTorch spends on them on the CPU of this machine, measured on samples."""
        return sum(row.wasted_seconds for row in self.rows)
