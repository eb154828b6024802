"""What a load would do, and take, before it is done: no weight is read, and no memory for weights is taken."""

from fabric_init.tools.forecast.coverage import Amount, Cast, Coverage, Fresh, Unexpected, WrongShape
from fabric_init.tools.forecast.forecast import Forecast, forecast
from fabric_init.tools.forecast.io_estimate import IoEstimate
from fabric_init.tools.forecast.memory import Memory
from fabric_init.tools.forecast.training_config import OptimizerName, PrecisionName, StrategyName, TrainingConfig

__all__ = [
    "Amount",
    "Cast",
    "Coverage",
    "Forecast",
    "Fresh",
    "IoEstimate",
    "Memory",
    "OptimizerName",
    "PrecisionName",
    "StrategyName",
    "TrainingConfig",
    "Unexpected",
    "WrongShape",
    "forecast",
]
