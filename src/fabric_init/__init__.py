"""Record how a model would be built, then give each tensor its value once."""

import importlib
import threading
import typing

if typing.TYPE_CHECKING:
    from fabric_init.api import deferred_init, init_missing, init_report, materialize
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
    from fabric_init.reports.init_report import InitReport
    from fabric_init.tools.audit.audit import audit
    from fabric_init.tools.audit.report import AuditReport
    from fabric_init.tools.forecast.forecast import Forecast, forecast

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

# Where each name is from. It is imported when it is first asked for: torch and lightning take seconds, for which no
# shell should have to wait that only completes a command.
_HOMES = {
    "AuditReport": "tools.audit.report",
    "CheckpointError": "errors",
    "CheckpointFormatError": "errors",
    "CheckpointMismatchError": "errors",
    "CheckpointNotFoundError": "errors",
    "Fabric": "fabric",
    "FabricInitError": "errors",
    "Forecast": "tools.forecast.forecast",
    "InitReport": "reports.init_report",
    "OutOfMemoryError": "errors",
    "RecordingError": "errors",
    "UninitializedTensorError": "errors",
    "audit": "tools.audit.audit",
    "deferred_init": "api",
    "forecast": "tools.forecast.forecast",
    "init_missing": "api",
    "init_report": "api",
    "materialize": "api",
}
_one_at_a_time = threading.RLock()  # lightning's modules import one another in circles: two threads would meet there
_PACKAGES = ("checkpoints", "errors", "reports", "strategies", "tools")


def __getattr__(name: str) -> object:
    """A public name, or one of the packages that users look into (``fabric_init.strategies.FSDP2Strategy``)."""
    if name not in _HOMES and name not in _PACKAGES:
        raise AttributeError(f"module 'fabric_init' has no attribute {name!r}")
    with _one_at_a_time:
        if name in _PACKAGES:
            return importlib.import_module(f"fabric_init.{name}")
        value = getattr(importlib.import_module(f"fabric_init.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
