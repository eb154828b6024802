"""Forecast what a load does and the memory it takes, without reading weights or allocating memory for them."""

from fabric_init.tools.forecast.coverage import Amount, Cast, Coverage, Fresh, Unexpected, WrongShape
from fabric_init.tools.forecast.forecast import Forecast, forecast
from fabric_init.tools.forecast.memory import Memory
from fabric_init.tools.forecast.reading_by_rank import IoEstimate
from fabric_init.tools.forecast.training_config import TrainingConfig

__all__ = [
    "Amount",
    "Cast",
    "Coverage",
    "Forecast",
    "Fresh",
    "IoEstimate",
    "Memory",
    "TrainingConfig",
    "Unexpected",
    "WrongShape",
    "forecast",
]
