"""How each Lightning strategy keeps a model's tensors, and what another strategy needs to do the same."""

from fabric_init.checkpoints import Box, Region, Span
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.tensors import TensorInfo
from fabric_init.strategies.ddp import DDPStrategy
from fabric_init.strategies.deepspeed import DeepSpeedStrategy
from fabric_init.strategies.fsdp import FSDPStrategy
from fabric_init.strategies.fsdp2 import FSDP2Strategy, ModelParallelStrategy
from fabric_init.strategies.mixin import DeferredInitMixin
from fabric_init.strategies.registry import register_strategy
from fabric_init.strategies.single_device import SingleDeviceStrategy

__all__ = [
    "Box",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "DeferredInitMixin",
    "FSDP2Strategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "Placement",
    "Region",
    "SingleDeviceStrategy",
    "Span",
    "TensorInfo",
    "WholeTensors",
    "register_strategy",
]
