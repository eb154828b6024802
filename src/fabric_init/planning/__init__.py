"""What a load would do, and take, before it is done: no weight is read, and no memory for weights is taken."""

from fabric_init.planning.coverage import Amount, Cast, Coverage, Fresh, Unexpected, WrongShape
from fabric_init.planning.forecasting import Forecast, forecast
from fabric_init.planning.memory import Memory
from fabric_init.planning.reading import Reading
from fabric_init.planning.setting import OptimizerName, PrecisionName, Setting, StrategyName

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
