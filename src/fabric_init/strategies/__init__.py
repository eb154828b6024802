"""How each Lightning strategy keeps a model's tensors."""

from fabric_init.strategies.deepspeed import DeepSpeedStrategy
from fabric_init.strategies.fsdp2 import FSDP2Strategy, ModelParallelStrategy
from fabric_init.strategies.placement import register_placement

__all__ = ["DeepSpeedStrategy", "FSDP2Strategy", "ModelParallelStrategy", "register_placement"]
