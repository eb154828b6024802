"""TODO"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fabric_init.checkpoints import Region, TensorSpec
from fabric_init.checkpoints.region import take


class StateDictReader:
    """A state dict in memory, as a :class:`~fabric_init.checkpoints.reader.CheckpointReader`."""

    path = Path("load_state_dict")
    format = "state dict"
    note: str | None = "loaded before the model had memory"

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def keys(self) -> Sequence[str]:
        return tuple(self._state)

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(self._state[key].shape, self._state[key].dtype)

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """A copy on the CPU: what the user has loaded stays the user's."""
        part = take(self._state[key], region)
        return part.to("cpu", copy=True, memory_format=torch.contiguous_format)
