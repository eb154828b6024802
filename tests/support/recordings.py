"""Questions that tests ask recorded tensors."""

from __future__ import annotations

from torch import Tensor

from fabric_init.recording.tensor.recorded_tensor import RecordedTensor


def is_recorded(tensor: Tensor) -> bool:
    """Whether ``tensor`` has no memory yet."""
    return isinstance(tensor, RecordedTensor)
