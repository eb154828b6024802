"""The init report: how each tensor of a model got its value."""

from fabric_init.reports.init_report import InitReport
from fabric_init.reports.provenance import Write
from fabric_init.reports.rows import InitRow, Status, TensorTrace

__all__ = ["InitReport", "InitRow", "Status", "TensorTrace", "Write"]
