"""Where a strategy keeps a tensor: the one thing in which strategies differ."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fabric_init.checkpoints.region import Region
from fabric_init.planning.tensors import TensorInfo


class Placement(Protocol):
    """How one rank keeps a model's tensors.

    Order of calls, for every tensor: ``device``, ``region``, then ``put`` with the values of that region. Values of all
    tensors may be gathered before the first ``put``. Every rank makes the same calls in the same order.
    """

    def device(self, slot: TensorInfo) -> torch.device:
        """Where the values are to be."""
        ...

    def region(self, slot: TensorInfo) -> Region | None:
        """The part of the full tensor that this rank owns; ``None`` for all of it."""
        ...

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        """Make the model hold ``value`` (the region's values, on ``device(slot)``) where it holds ``tensor``.

        Gives what the model holds now: ``tensor`` itself, unless the strategy has made tensors of its own anyway.
        """
        ...

    def held(self, tensor: Tensor) -> Tensor:
        """This rank's own memory of ``tensor``, after ``put``: the tensor itself, unless only a part of it is here."""
        ...


class WholeTensors:
    """Every rank keeps every tensor whole: one device, DDP.

    Args:
        target: the device for all of them; ``None`` leaves each on the device that the constructor asked for.
    """

    def __init__(self, target: torch.device | None = None) -> None:
        self._target = target

    def device(self, slot: TensorInfo) -> torch.device:
        if self._target is not None:
            return self._target
        return slot.device if slot.device.type != "meta" else torch.device("cpu")  # built on meta, by the user

    def region(self, slot: TensorInfo) -> Region | None:
        return None

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        become(tensor, value)
        return tensor

    def held(self, tensor: Tensor) -> Tensor:
        return tensor


def become(tensor: Tensor, value: Tensor) -> None:
    """Give ``tensor``, which stays the same Python object, the memory of ``value``.

    ``torch.utils.swap_tensors`` would do, but for three things: it also swaps the objects' attributes, drops hooks,
    and refuses tensors that something holds a weak reference to. The swap under it has none of these troubles.
    """
    hooks = tensor._backward_hooks if tensor.is_leaf else None
    after_accumulation = tensor._post_accumulate_grad_hooks if tensor.is_leaf else None
    requires_grad = tensor.requires_grad and tensor.is_leaf
    if isinstance(tensor, nn.Parameter):
        other: Tensor = nn.Parameter(value, requires_grad=False)
    else:
        other = value.detach()
    other.requires_grad_(requires_grad)
    torch._C._swap_tensor_impl(tensor, other)
    if hooks:
        tensor._backward_hooks = hooks
    if after_accumulation:
        tensor._post_accumulate_grad_hooks = after_accumulation
