"""How each Lightning strategy keeps a model's tensors, and what another strategy needs to do the same."""

from fabric_init.checkpoints import Box, Region, Span
from fabric_init.filling.placement import Placement, WholeTensors
from fabric_init.filling.slots import Slot
from fabric_init.strategies.binding import ShardedPlacement
from fabric_init.strategies.ddp import DDPStrategy
from fabric_init.strategies.deepspeed import DeepSpeedStrategy
from fabric_init.strategies.dtensors import ShardedTensors
from fabric_init.strategies.fsdp import FSDPStrategy
from fabric_init.strategies.fsdp2 import FSDP2Strategy, ModelParallelStrategy
from fabric_init.strategies.recorded_init import RecordedInit, register_strategy
from fabric_init.strategies.single_device import SingleDeviceStrategy

__all__ = [
    "Box",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDP2Strategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "Placement",
    "RecordedInit",
    "Region",
    "ShardedPlacement",
    "ShardedTensors",
    "SingleDeviceStrategy",
    "Slot",
    "Span",
    "WholeTensors",
    "register_strategy",
]
