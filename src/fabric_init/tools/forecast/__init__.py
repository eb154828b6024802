"""What a load would do, and take, before it is done: no weight is read, and no memory for weights is taken."""

from fabric_init.tools.forecast.coverage import Amount, Cast, Coverage, Fresh, Unexpected, WrongShape
from fabric_init.tools.forecast.forecast import Forecast, forecast
from fabric_init.tools.forecast.io_estimate import Reading
from fabric_init.tools.forecast.memory import Memory
from fabric_init.tools.forecast.training_config import OptimizerName, PrecisionName, Setting, StrategyName

__all__ = [
    "Amount",
    "Cast",
    "Coverage",
    "Forecast",
    "Fresh",
    "Memory",
    "OptimizerName",
    "PrecisionName",
    "Reading",
    "Setting",
    "StrategyName",
    "Unexpected",
    "WrongShape",
    "forecast",
]
