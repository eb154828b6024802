"""Calls that are recorded as one op, although torch makes them of several.

Some functions of torch in C++ read the memory of their arguments without calling an operator: they find none. Others go
another way for tensors of a subclass, which ends in other bits: they also compute the vectors that a derivative would
need, say. Such a call is recorded as what it is, and replay calls the same function on plain tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction, lstm, resolve_packet
from fabric_init.errors import RecordingError
from fabric_init.recording.in_block.device_queries import Handler
from fabric_init.recording.in_block.meta_kernels import tensors_in
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tensor.recorded_tensor import recorded

_NOT_ALLOCATED = "but its data is not allocated yet"
"""What code in C++ says that looks for memory on the meta device (torch 2.13)."""


def _operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the operator that ``func`` calls with these arguments, or ``None`` if there is no such one."""
    packet = getattr(torch.ops.aten, func.__name__, None)
    if packet is None:
        return None
    try:
        return getattr(packet, resolve_packet(f"aten::{func.__name__}", *args, **kwargs) or "default")
    except RuntimeError:
        return None


def read_memory(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> Any:
    """Run a call again, as one op, if ``error`` says that it has looked for memory; raises ``error`` otherwise."""
    if _NOT_ALLOCATED not in str(error):
        raise error
    with DisableTorchFunction():
        operator = _operator(func, args, kwargs)
        if operator is None:
            raise RecordingError(
                f"{getattr(func, '__name__', func)} in a recorded block reads memory of a tensor that has none yet. "
                "Call it after the block, or compute its arguments outside the block, where they are plain tensors."
            ) from error
        with DisableTorchDispatch():
            return recorder.record_op(operator, args, kwargs)


def _whole(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(tensors_in((args, kwargs.values())))
    with DisableTorchFunction():
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if differentiable or not any(recorded(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        operator = _operator(func, args, kwargs)
        if operator is None:
            return func(*args, **kwargs)
        with DisableTorchDispatch():
            return recorder.record_op(operator, args, kwargs)


_OTHER_FOR_SUBCLASSES: tuple[Any, ...] = (
    torch.linalg.svdvals,
    torch.linalg.eigvalsh,
    torch.linalg.cond,
    torch.linalg.matrix_norm,
    torch.linalg.matrix_rank,
    torch.linalg.norm,
    lstm,
)
HANDLERS: dict[Any, Handler] = dict.fromkeys(_OTHER_FOR_SUBCLASSES, _whole)
