"""Placement: where a strategy keeps a tensor. It is the only thing in which strategies differ."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import swap_tensor_impl
from fabric_init.checkpoints.region import Region
from fabric_init.planning.tensors import TensorInfo


class Placement(Protocol):
    """How one rank keeps a model's tensors.

    Order of calls, for every tensor: ``device``, ``region``, then ``put`` with the values of that region. The values of
    all tensors may be computed before the first ``put``. Every rank makes the same calls in the same order.
    """

    def device(self, slot: TensorInfo) -> torch.device:
        """Return the device for the values."""
        ...

    def region(self, slot: TensorInfo) -> Region | None:
        """Return the part of the full tensor that this rank owns; ``None`` for all of it."""
        ...

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        """Make the model hold ``value`` in place of ``tensor``.

        Args:
            slot: The tensor's description.
            tensor: The tensor that the model holds, still without memory.
            value: The region's values: of its shape, in ``slot.dtype``, on ``device(slot)``.

        Returns:
            The tensor that the model holds now, which is ``tensor`` itself unless the strategy makes its own tensors.
        """
        ...

    def held(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of ``tensor`` after ``put``: the tensor itself, unless it is sharded."""
        ...


class WholeTensors:
    """The placement of one device and of DDP: every rank keeps full tensors.

    Args:
        target: The device for all tensors; ``None`` leaves each on the device that the constructor asked for.
    """

    def __init__(self, target: torch.device | None = None) -> None:
        self._target = target

    def device(self, slot: TensorInfo) -> torch.device:
        if self._target is not None:
            return self._target
        return slot.device if slot.device.type != "meta" else torch.device("cpu")  # the user built it on meta

    def region(self, slot: TensorInfo) -> Region | None:
        return None

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        become(tensor, value)
        return tensor

    def held(self, tensor: Tensor) -> Tensor:
        return tensor


def become(tensor: Tensor, value: Tensor) -> None:
    """Make ``tensor``, which stays the same Python object, hold the memory of ``value``.

    [Note: why parameters keep their identity]

    A recorded parameter and the filled one are the same object, not a new one in the same place. Model code and users
    hold references to parameters outside of ``Module._parameters``: ties, attributes and lists of the model, optimizers
    that were made before ``setup``, attributes set on the parameter (such as a flag that excludes it from weight
    decay), hooks on it, and subclasses of ``nn.Parameter``. With a new object each of these would silently refer to
    the old one, without memory. It is also how plans find a tensor again in a model that was changed since: by
    identity, whatever its name is now.

    ``torch.utils.swap_tensors`` is not used because it also swaps the objects' attributes, drops hooks, and refuses
    tensors with weak references. The private function that it calls does none of this.
    """
    hooks = tensor._backward_hooks if tensor.is_leaf else None
    after_accumulation = tensor._post_accumulate_grad_hooks if tensor.is_leaf else None
    requires_grad = tensor.requires_grad and tensor.is_leaf
    if isinstance(tensor, nn.Parameter):
        other: Tensor = nn.Parameter(value, requires_grad=False)
    else:
        other = value.detach()
    other.requires_grad_(requires_grad)
    swap_tensor_impl(tensor, other)
    if hooks:
        tensor._backward_hooks = hooks
    if after_accumulation:
        tensor._post_accumulate_grad_hooks = after_accumulation
