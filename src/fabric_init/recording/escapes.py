"""Values that leave torch for Python, or enter it: code that asks for one gets the true one."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fabric_init.errors import RecordingError
from fabric_init.recording.device_queries import Handler
from fabric_init.recording.recorder import Recorder
from fabric_init.recording.tensor import RecordedTensor, recorded, recorded_tensor


def _with_true_value(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        if recorded(args[0]) is None:
            return func(*args, **kwargs)
        real = recorder.true_value(args[0])
        result = func(real, *args[1:], **kwargs)
    if hasattr(result, "flags"):
        result.flags.writeable = False  # a write to this array could not reach the recorded tensor: numpy refuses it
    return result


_TYPED_STORAGE = Tensor._typed_storage.__code__
_WANT_BYTES = (Tensor._reduce_ex_internal.__code__, Tensor.storage.__code__)


def _untyped_storage(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where ``pickle``, ``torch.save`` and ``tensor.storage()`` come for the bytes, they get the true ones."""
    with torch._C.DisableTorchFunction():
        asking = sys._getframe(2)
        behind = asking.f_back
        wants_bytes = asking.f_code is _TYPED_STORAGE and behind is not None and behind.f_code in _WANT_BYTES
        if wants_bytes and recorded(args[0]) is not None:
            return recorder.true_value(args[0]).untyped_storage()
        return func(*args, **kwargs)


def _share_memory(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        if recorded(args[0]) is not None:
            raise RecordingError(
                "share_memory_() in a recorded constructor: there is no memory to share yet. Call it on the model when "
                "it is filled."
            )
        return func(*args, **kwargs)


def _plain_index(index: Any) -> Any:
    """An index whose lists are tensors: torch would make them on the meta device, where they lose their values."""
    if isinstance(index, tuple):
        return tuple(_plain_index(item) for item in index)
    if isinstance(index, list) and not any(isinstance(item, (slice, Tensor, type(None), type(...))) for item in index):
        return torch.tensor(index)
    return torch.from_numpy(index) if type(index).__name__ == "ndarray" else index


def _index(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        if recorded(args[0]) is not None:
            args = (args[0], _plain_index(args[1]), *args[2:])
        return func(*args, **kwargs)


def _new_tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.new_tensor(data)`` and ``t.new(data)``: real values, of ``t``'s dtype and on its device."""
    with torch._C.DisableTorchFunction():
        found = recorded(args[0])
        data = args[1] if len(args) == 2 else kwargs.get("data")
        if found is None or data is None or (func is Tensor.new and isinstance(data, (int, torch.Size))):
            return func(*args, **kwargs)
        dtype, device = kwargs.get("dtype") or args[0].dtype, kwargs.get("device") or found.device
        if isinstance(data, Tensor):
            return data if func is Tensor.new else data.detach().to(device=device, dtype=dtype, copy=True)
        made = torch.tensor(data, dtype=dtype, device=device)
        return made.requires_grad_() if kwargs.get("requires_grad") else made


def _tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.tensor([a, b])`` of recorded scalars: torch takes their values without asking any mode."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if recorded(value) is None else recorder.true_value(value)
        return type(value)([plain(item) for item in value]) if type(value) in (list, tuple) else value

    with torch._C.DisableTorchFunction():
        if args and type(args[0]) in (list, tuple):
            args = (plain(args[0]), *args[1:])
    return func(*args, **kwargs)  # a default device, or one that was asked for, still counts


def _set_data(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``p.data = t``. torch refuses to mix meta with real memory, so a real ``t`` enters the tape as a constant."""
    target, value = args
    with torch._C.DisableTorchFunction():
        if recorded(target) is not None and recorded(value) is None and not value.is_meta:
            value = recorder.constant(value.detach())
        elif recorded(target) is None and not target.is_meta and recorded(value) is not None:
            value = recorder.true_value(value)
        if isinstance(value, RecordedTensor) and not isinstance(target, RecordedTensor):
            value = value._meta
        elif isinstance(target, RecordedTensor) and not isinstance(value, RecordedTensor) and (like := recorded(value)):
            value = recorded_tensor(value, like.device)
        func(target, value)
        if isinstance(target, RecordedTensor) and isinstance(value, RecordedTensor):
            with torch._C._DisableTorchDispatch():
                target._meta, target._claimed = value._meta.detach(), value._claimed


def _get_data(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.data``, also of a lazy tensor, which asks it for the device that it is to get its memory on."""
    with torch._C.DisableTorchFunction():
        data = func(*args)
        found = None if isinstance(data, RecordedTensor) else recorded(data)
        return data if found is None else recorded_tensor(data, found.device)


HANDLERS: dict[Any, Handler] = {
    Tensor.tolist: _with_true_value,
    Tensor.numpy: _with_true_value,
    Tensor.__array__: _with_true_value,
    Tensor.__dlpack__: _with_true_value,
    Tensor.__dlpack_device__: _with_true_value,
    Tensor.untyped_storage: _untyped_storage,
    Tensor.share_memory_: _share_memory,
    Tensor.__getitem__: _index,
    Tensor.__setitem__: _index,
    Tensor.new_tensor: _new_tensor,
    Tensor.new: _new_tensor,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
