"""Audit the init of a model: how its tensors are written, and what one pass with a batch shows."""

from fabric_init.tools.audit.audit import audit
from fabric_init.tools.audit.findings import AuditRow, Finding, Layer, Level
from fabric_init.tools.audit.report import AuditReport

__all__ = ["AuditReport", "AuditRow", "Finding", "Layer", "Level", "audit"]
