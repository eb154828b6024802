"""A state dict in memory as a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fabric_init.checkpoints.reader import BaseReader, TensorSpec
from fabric_init.checkpoints.region import Region, take


class StateDictReader(BaseReader):
    """A :class:`~fabric_init.checkpoints.reader.CheckpointReader` over the tensors of a state dict."""

    path = Path("load_state_dict")
    format = "state dict"
    note: str | None = "loaded before the model had memory"

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state
        self.specs = {key: TensorSpec(tensor.shape, tensor.dtype) for key, tensor in state.items()}

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """Return a copy on the CPU: filling must not tie the model to the tensors that the user has loaded."""
        part = take(self._state[key], region)
        return part.to("cpu", copy=True, memory_format=torch.contiguous_format)
