"""Functions that read or write the memory of a tensor without an operator, in a block and after it: one rule for each.

- What **reads** gets the true values. In a block nobody may write to those, as the tensor would not hear of it.
- What lets **Python change** each element does so on copies, and the result is written by an operator.
- What hands out a **storage** or an **address** hands out one that answers for itself while there is no memory.
- What has to **place** the memory elsewhere is refused in a block.

Values that operators return to Python (``.item()``, ``if``, ``nonzero``) are the recorder's: see ``recorder.py``. To
all other code in C++ torch itself refuses the memory: see ``begin_unmarked`` in ``tensor/storage_tags.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

import torch.utils.dlpack
from torch import Tensor

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.errors import RecordingError
from fabric_init.recording.in_block.device_queries import Handler
from fabric_init.recording.tensor.address import Address
from fabric_init.recording.tensor.recorded_tensor import recorded, recorded_ref
from fabric_init.recording.tensor.storage_tags import StorageTag


def _has_memory(found: StorageTag, tensor: Tensor) -> bool:
    """Return whether the values of ``tensor`` are in memory that stays, or can be made there."""
    later: Any = found.tape.after_block
    return found.memory is not None or (not later.block_is_open and later.has_value(tensor))


def _of_recorded(handle: Callable[..., Any]) -> Handler:
    """Return a handler that lets plain tensors alone, and calls ``handle`` with the recording of others."""

    @wraps(handle)
    def handler(recorder: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with DisableTorchFunction():
            found = recorded(args[0])
            return func(*args, **kwargs) if found is None else handle(recorder, found, func, args, kwargs)

    return handler


@_of_recorded
def _read(recorder: Any, found: StorageTag, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(recorder.look_at(args[0]), *args[1:], **kwargs)
    if found.memory is None and hasattr(result, "flags"):
        result.flags.writeable = False  # a write could not reach the recorded tensor: let NumPy raise
    return result


@_of_recorded
def _format(recorder: Any, found: StorageTag, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is shown to people decides nothing, so it is no look. A DTensor prints its shard like this."""
    if not args[1] and not found.tape.after_block.block_is_open:
        return repr(args[0])
    return func(recorder.true_value(args[0]), *args[1:], **kwargs)


@_of_recorded
def _dlpack(recorder: Any, found: StorageTag, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand out the true values by DLPack, in a block read-only, which NumPy can say and torch does not listen to."""
    value = recorder.look_at(args[0])
    if found.memory is not None or kwargs.get("copy"):
        return func(value, *args[1:], **kwargs)
    if kwargs.get("max_version") is None or _is_asked_by(torch.utils.dlpack.from_dlpack.__code__):
        raise RecordingError(
            "DLPack in a recorded block: the tensor has no memory to share yet, and what is written there would be "
            "lost. Use the tensor itself, tensor.numpy(), or copy=True, or do it after the block."
        )
    array = value.numpy()
    array.flags.writeable = False
    return array.__dlpack__(**{name: given for name, given in kwargs.items() if name != "stream"})


def _is_asked_by(code: Any) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _by_python(recorder: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let ``t.apply_(f)`` and the like change a copy of the true values, and write the result by an operator."""
    with DisableTorchFunction():
        target = args[0]
        given = [recorder.look_at(v) if isinstance(v, Tensor) and recorded(v) is not None else v for v in args]
        if recorded(target) is None:
            return func(*given, **kwargs)
        changed = given[0].detach().clone().requires_grad_(target.requires_grad)
        func(changed, *given[1:], **kwargs)
        target.detach().copy_(changed)
        return target


@_of_recorded
def _storage(recorder: Any, found: StorageTag, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the storage with the values, if they can be had; otherwise the one on meta, which answers for itself."""
    tensor = args[0]
    return func(found.tape.after_block.value(tensor, "be read") if _has_memory(found, tensor) else tensor)


@_of_recorded
def _data_ptr(recorder: Any, found: StorageTag, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the address of the values, or what stands for it while there is none."""
    tensor = args[0]
    if _has_memory(found, tensor):
        return func(found.tape.after_block.value(tensor, "be read"))
    if not tensor.numel():
        return 0  # as torch
    if _saves(sys._getframe(3)):
        tensor._held = recorder.look_at(tensor)  # as long as the tensor, which is how long the bytes may be read
        return tensor._held.data_ptr()
    return Address(found, recorded_ref(tensor, found.storage).offset * tensor.element_size())


def _is_set_to(recorder: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether two tensors are on the same memory, or will be."""
    with DisableTorchFunction():
        one, other = args
        found, its = recorded(one), recorded(other)
        if found is not None and its is not None:
            return recorded_ref(one, found.storage) == recorded_ref(other, its.storage)
        return bool(func(*(recorder.true_value(each) if recorded(each) else each for each in args)))


_SAFETENSORS_READS = ("_to_ndarray", "_tobytes")


def _saves(frame: FrameType | None) -> bool:
    """Return whether this frame, or one that has called it, is of safetensors where that reads bytes at an address."""
    for _ in range(4):
        if frame is None:
            break
        if frame.f_code.co_name in _SAFETENSORS_READS and frame.f_globals.get("__name__") == "safetensors.torch":
            return True
        frame = frame.f_back
    return False


@_of_recorded
def _share_memory(recorder: Any, found: StorageTag, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    later: Any = found.tape.after_block
    if found.memory is None and later.block_is_open:
        raise RecordingError(
            f"share_memory_() in a recorded constructor: the tensor of shape {tuple(args[0].shape)} has no memory "
            "to share yet. Call it after the model has been materialized."
        )
    return func(later.value(args[0], "be read"))


_NUMBERS = (Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__)
_READ = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack_device__, *_NUMBERS)
_CHANGED_BY_PYTHON = (Tensor.apply_, Tensor.map_, Tensor.map2_)

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(_READ, _read),
    Tensor.__format__: _format,
    Tensor.__dlpack__: _dlpack,
    **dict.fromkeys(_CHANGED_BY_PYTHON, _by_python),
    Tensor.untyped_storage: _storage,
    Tensor.storage: _storage,
    Tensor.data_ptr: _data_ptr,
    Tensor.const_data_ptr: _data_ptr,  # type: ignore[attr-defined]
    Tensor.is_set_to: _is_set_to,
    Tensor.share_memory_: _share_memory,
}
"""The same with :class:`~fabric_init.recording.after_block.dispatch.AfterBlock` when no block is open."""
