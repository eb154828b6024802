"""Record how a model would be built, then give each tensor its value once."""

import importlib
import threading
import typing

if typing.TYPE_CHECKING:
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

# Where each name is from. It is imported when it is first asked for: torch and lightning take seconds, for which no
# shell should have to wait that only completes a command.
_HOMES = {
    "AuditReport": "auditing.report",
    "CheckpointError": "errors",
    "CheckpointFormatError": "errors",
    "CheckpointMismatchError": "errors",
    "CheckpointNotFoundError": "errors",
    "Fabric": "fabric",
    "FabricInitError": "errors",
    "Forecast": "planning",
    "InitReport": "filling.report",
    "OutOfMemoryError": "errors",
    "RecordingError": "errors",
    "UninitializedTensorError": "errors",
    "audit": "auditing.audit",
    "deferred_init": "filling.deferred",
    "forecast": "planning",
    "init_missing": "strategies.wrappers",
    "init_report": "strategies.wrappers",
    "materialize": "filling.materialize",
}
_one_at_a_time = threading.RLock()  # lightning's modules import one another in circles: two threads would meet there
_PACKAGES = ("auditing", "checkpoints", "errors", "inspection", "planning", "strategies")


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
