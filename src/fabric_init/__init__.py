"""Record how a model would be built, then give each tensor its value once."""

import importlib
import threading
import typing

if typing.TYPE_CHECKING:  # `as` marks a name as re-exported
    from fabric_init.api import deferred_init as deferred_init
    from fabric_init.api import init_missing as init_missing
    from fabric_init.api import init_report as init_report
    from fabric_init.api import materialize as materialize
    from fabric_init.api import param_init_fn as param_init_fn
    from fabric_init.errors import CheckpointError as CheckpointError
    from fabric_init.errors import CheckpointFormatError as CheckpointFormatError
    from fabric_init.errors import CheckpointMismatchError as CheckpointMismatchError
    from fabric_init.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from fabric_init.errors import FabricInitError as FabricInitError
    from fabric_init.errors import OptionError as OptionError
    from fabric_init.errors import OutOfMemoryError as OutOfMemoryError
    from fabric_init.errors import RanksDisagreeError as RanksDisagreeError
    from fabric_init.errors import RanksLostError as RanksLostError
    from fabric_init.errors import RecordingError as RecordingError
    from fabric_init.errors import UninitializedTensorError as UninitializedTensorError
    from fabric_init.fabric import Fabric as Fabric
    from fabric_init.reports.init_report import InitReport as InitReport
    from fabric_init.tools.audit.audit import audit as audit
    from fabric_init.tools.audit.report import AuditReport as AuditReport
    from fabric_init.tools.forecast.forecast import Forecast as Forecast
    from fabric_init.tools.forecast.forecast import forecast as forecast
    from fabric_init.trainer.fill_model import FillModel as FillModel

__version__ = "0.1.0"

# Where each public name is defined. Modules are imported on first use: torch and lightning take seconds, which a shell
# that completes a command should not wait for.
_HOMES = {
    "AuditReport": "tools.audit.report",
    "CheckpointError": "errors",
    "CheckpointFormatError": "errors",
    "CheckpointMismatchError": "errors",
    "CheckpointNotFoundError": "errors",
    "Fabric": "fabric",
    "FabricInitError": "errors",
    "FillModel": "trainer.fill_model",
    "Forecast": "tools.forecast.forecast",
    "InitReport": "reports.init_report",
    "OptionError": "errors",
    "OutOfMemoryError": "errors",
    "RanksDisagreeError": "errors",
    "RanksLostError": "errors",
    "RecordingError": "errors",
    "UninitializedTensorError": "errors",
    "audit": "tools.audit.audit",
    "deferred_init": "api",
    "forecast": "tools.forecast.forecast",
    "init_missing": "api",
    "init_report": "api",
    "materialize": "api",
    "param_init_fn": "api",
}
_PACKAGES = ("checkpoints", "errors", "reports", "strategies", "tools", "trainer")

__all__ = list(_HOMES)

# Two threads that import at once could deadlock in the circular imports between lightning's modules.
_import_lock = threading.RLock()


def __getattr__(name: str) -> object:
    """Import and return a public name, or a package that users access as an attribute (``fabric_init.strategies``)."""
    if name not in _HOMES and name not in _PACKAGES:
        raise AttributeError(f"module 'fabric_init' has no attribute {name!r}")
    with _import_lock:
        if name in _PACKAGES:
            return importlib.import_module(f"fabric_init.{name}")
        value = getattr(importlib.import_module(f"fabric_init.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
