"""Where a strategy keeps a tensor: the one thing in which strategies differ."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fabric_init.checkpoints.region import Region
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tensor import become


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
