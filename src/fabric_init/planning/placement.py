"""Placement: where a strategy keeps a tensor. It is the only thing in which strategies differ."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fabric_init.checkpoints.region import Region
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tensor.recorded_tensor import become


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


class WholeTensors:
    """The placement of one device and of DDP: every rank keeps full tensors.

    Args:
        target: The device for all tensors; ``None`` leaves each on the device that the constructor asked for.
        moves: Whether tensors that have values already are moved there, too.
    """

    def __init__(self, target: torch.device | None = None, *, moves: bool = True) -> None:
        self._target = target
        self._moves = moves

    def device(self, slot: TensorInfo) -> torch.device:
        if slot.real and not self._moves:
            return slot.device
        if self._target is not None:
            return self._target
        return slot.device if slot.device.type != "meta" else torch.device("cpu")  # the user built it on meta

    def region(self, slot: TensorInfo) -> Region | None:
        return None

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        become(tensor, value)
        return tensor
