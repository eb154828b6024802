"""How each Lightning strategy keeps a model's tensors."""

from fabric_init.strategies.ddp import DDPStrategy
from fabric_init.strategies.fsdp2 import FSDP2Strategy, ModelParallelStrategy
from fabric_init.strategies.recorded_init import RecordedInit, register_strategy
from fabric_init.strategies.single_device import SingleDeviceStrategy

__all__ = [
    "DDPStrategy",
    "FSDP2Strategy",
    "ModelParallelStrategy",
    "RecordedInit",
    "SingleDeviceStrategy",
    "register_strategy",
]
