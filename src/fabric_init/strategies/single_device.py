"""One device, CPU or CUDA: full tensors on that device."""

from __future__ import annotations

import lightning.fabric.strategies as lightning_strategies
from torch import nn

from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.strategies.mixin import DeferredInitMixin
from fabric_init.strategies.registry import register_strategy


class SingleDeviceStrategy(DeferredInitMixin, lightning_strategies.SingleDeviceStrategy):
    """Lightning's strategy of the same name; models built without values are filled when their block ends."""

    def placement(self, model: nn.Module) -> Placement:
        return WholeTensors(self.root_device)


register_strategy(SingleDeviceStrategy, instead_of=lightning_strategies.SingleDeviceStrategy)
