"""Functions of torch that are refused for recorded tensors: the result would differ from that of plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.errors import RecordingError
from fabric_init.recording.in_block.device_queries import Handler
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tensor.recorded_tensor import recorded


def _autocast(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with DisableTorchFunction():
        first = next((recording for arg in args if isinstance(arg, Tensor) and (recording := recorded(arg))), None)
        if first is not None and torch.is_autocast_enabled(first.device.type):
            raise RecordingError(
                f"{func.__name__} under torch.autocast in a recorded constructor: autocast does not apply to recorded "
                "tensors, so the result would have another dtype. Run the model after the block instead."
            )
        return func(*args, **kwargs)


_AUTOCAST: tuple[Any, ...] = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.einsum,
    F.linear,
)
_AUTOCAST += (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.scaled_dot_product_attention)

HANDLERS: dict[Any, Handler] = dict.fromkeys(_AUTOCAST, _autocast)
