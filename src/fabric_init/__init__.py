"""Record how a model would be built, then give each tensor its value once."""

from fabric_init.auditing.audit import audit
from fabric_init.auditing.report import AuditReport
from fabric_init.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    FabricInitError,
    OutOfMemoryError,
    RecordingError,
    UninitializedTensorError,
)
from fabric_init.fabric import Fabric
from fabric_init.filling.deferred import deferred_init
from fabric_init.filling.materialize import materialize
from fabric_init.filling.report import InitReport
from fabric_init.planning import Forecast, forecast
from fabric_init.strategies.wrappers import init_missing, init_report

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "Fabric",
    "FabricInitError",
    "Forecast",
    "InitReport",
    "OutOfMemoryError",
    "RecordingError",
    "UninitializedTensorError",
    "audit",
    "deferred_init",
    "forecast",
    "init_missing",
    "init_report",
    "materialize",
]
