"""ZeRO-3: each rank keeps a flat slice of every parameter, which DeepSpeed's ``zero.Init`` cuts and we fill."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init.checkpoints import Region, Span
from fabric_init.filling.placement import become
from fabric_init.filling.slots import Slot


def partition_without_values(module: nn.Module, config: Any, remote_device: str | None) -> None:
    """Turn each parameter of ``module``, which stays the same object, into one that DeepSpeed has partitioned.

    No memory is taken, and no bytes go between ranks. Each ``ds_tensor`` is on the meta device, and keeps as
    ``fabric_init_place`` the device that it is to be on, and whether pinned.
    """
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    class Partitions(deepspeed.zero.Init):  # type: ignore[misc]
        local_device: Any
        remote_device: Any
        pin_memory: bool

        def _convert_to_zero_parameters(self, param_list: Iterable[Any]) -> None:
            """As DeepSpeed's, but for parameters without values: from a meta tensor, and without the broadcast."""
            local, remote, pinned = self.local_device, self.remote_device, self.pin_memory
            self.local_device = self.remote_device = torch.device("meta")
            self.pin_memory = False
            try:
                for parameter in param_list:
                    if not is_zero_param(parameter):
                        self._convert_to_deepspeed_param(parameter)
                        parameter.partition()
                        stays = parameter.ds_persist
                        parameter.ds_tensor.fabric_init_place = (
                            torch.device(local if stays else remote),
                            pinned and not stays,
                        )
                        parameter.ds_secondary_tensor = None  # hpZeRO's copy in a node: made anew after the next gather
                        become(parameter, torch.empty(0, dtype=parameter.dtype, device=local))
            finally:
                self.local_device, self.remote_device, self.pin_memory = local, remote, pinned

    Partitions(module=module, config_dict_or_path=config, remote_device=remote_device)


class ZeroPartitions:
    """A placement for parameters that DeepSpeed has partitioned (ZeRO-3), beside whole tensors.

    Args:
        device: where whole tensors, buffers for example, are to be.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parameters: dict[str, Any] = {}

    def current(self, slot: Slot, tensor: Tensor) -> Tensor:
        """What the model holds where it held ``tensor``: the same object still."""
        if hasattr(tensor, "ds_tensor"):
            self._parameters[slot.name] = tensor
        return tensor

    def held(self, tensor: Tensor) -> Tensor:
        """This rank's own memory of ``tensor``: 1-D and without padding, if it is partitioned."""
        parameter: Any = tensor
        return parameter.ds_tensor[: _span(parameter).numel] if hasattr(parameter, "ds_tensor") else tensor

    def device(self, slot: Slot) -> torch.device:
        parameter = self._parameters.get(slot.name)
        if parameter is not None:
            place: tuple[torch.device, bool] = parameter.ds_tensor.fabric_init_place
            return place[0]
        return slot.device if slot.real else self._device

    def region(self, slot: Slot) -> Region | None:
        parameter = self._parameters.get(slot.name)
        return None if parameter is None else _span(parameter)

    def put(self, slot: Slot, tensor: Tensor, value: Tensor) -> Tensor:
        parameter = self._parameters.get(slot.name)
        if parameter is None:
            become(tensor, value)
            return tensor
        part, padding = parameter.ds_tensor, parameter.partition_numel() - value.numel()
        if padding:
            value = nn.functional.pad(value, (0, padding))
        become(part, _pinned(value) if part.fabric_init_place[1] else value)
        return tensor


def _span(parameter: Any) -> Span:
    """This rank's slice of a partitioned parameter; the last one, or several, may be shorter than the others."""
    start = parameter.ds_zero_partition_rank * parameter.partition_numel()
    stop = start + parameter.partition_numel()
    return Span(min(start, parameter.ds_numel), min(stop, parameter.ds_numel))


def _pinned(value: Tensor) -> Tensor:
    from deepspeed.accelerator import get_accelerator

    pinned: Tensor = get_accelerator().pin_memory(value)
    return pinned
