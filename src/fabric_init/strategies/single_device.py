"""One device, CPU or CUDA: every tensor whole, on that device."""

from __future__ import annotations

from lightning.fabric.strategies.single_device import SingleDeviceStrategy

from fabric_init.filling.placement import Placement, WholeTensors
from fabric_init.strategies.placement import register_placement


def _placement(strategy: SingleDeviceStrategy) -> Placement:
    return WholeTensors(strategy.root_device)


register_placement(SingleDeviceStrategy, _placement)
