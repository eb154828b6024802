"""Functions by which tensors escape to Python, and values enter from it: code that reads a value gets the true one.

Values that operators return to Python (``.item()``, ``if``, ``nonzero``) are the recorder's: see ``recorder.py``. Both
make them with ``true_value`` of ``tape_writer.py``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction, reduce_ex_internal, typed_storage
from fabric_init.recording.in_block.device_queries import Handler
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, class_of, make_recorded_tensor, recorded


def _with_true_value(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with DisableTorchFunction():
        if recorded(args[0]) is None:
            return func(*args, **kwargs)
        for_people = func is Tensor.__format__
        real = recorder.true_value(args[0]) if for_people else recorder.look_at(args[0])
        result = func(real, *args[1:], **kwargs)
    if hasattr(result, "flags"):
        result.flags.writeable = False  # a write could not reach the recorded tensor: let NumPy raise
    return result


_TYPED_STORAGE = typed_storage.__code__
_READ_BYTES = (reduce_ex_internal.__code__, Tensor.storage.__code__)


def _untyped_storage(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the storage, with the true values if ``pickle``, ``torch.save`` or ``tensor.storage()`` asks for it."""
    with DisableTorchFunction():
        calling = sys._getframe(2)
        outer = calling.f_back
        wants_bytes = calling.f_code is _TYPED_STORAGE and outer is not None and outer.f_code in _READ_BYTES
        if wants_bytes and recorded(args[0]) is not None:
            return recorder.look_at(args[0]).untyped_storage()
        return func(*args, **kwargs)


def _plain_index(index: Any) -> Any:
    """Return ``index`` with lists as real tensors: torch would make them on meta, where they have no values."""
    if isinstance(index, tuple):
        return tuple(_plain_index(item) for item in index)
    if isinstance(index, list) and not any(isinstance(item, (slice, Tensor, type(None), type(...))) for item in index):
        return torch.tensor(index)
    return torch.from_numpy(index) if type(index).__name__ == "ndarray" else index


def _index(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with DisableTorchFunction():
        if recorded(args[0]) is not None:
            args = (args[0], _plain_index(args[1]), *args[2:])
        return func(*args, **kwargs)


def _new_tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``t.new_tensor(data)`` or ``t.new(data)`` on real values, with ``t``'s dtype and recorded device."""
    with DisableTorchFunction():
        recording = recorded(args[0])
        data = args[1] if len(args) == 2 else kwargs.get("data")
        if recording is None or data is None or (func is Tensor.new and isinstance(data, (int, torch.Size))):
            return func(*args, **kwargs)
        dtype, device = kwargs.get("dtype") or args[0].dtype, kwargs.get("device") or recording.device
        if isinstance(data, Tensor):
            return data if func is Tensor.new else data.detach().to(device=device, dtype=dtype, copy=True)
        tensor = torch.tensor(data, dtype=dtype, device=device)
        return tensor.requires_grad_() if kwargs.get("requires_grad") else tensor


def _tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``torch.tensor([a, b])`` on true values: torch reads recorded scalars in a list without calling a mode."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if recorded(value) is None else recorder.look_at(value)
        return type(value)([plain(item) for item in value]) if type(value) in (list, tuple) else value

    with DisableTorchFunction():
        if args and type(args[0]) in (list, tuple):
            args = (plain(args[0]), *args[1:])
    return func(*args, **kwargs)  # `func` applies a device argument and the default device


def _set_data(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run ``p.data = t``. torch refuses to mix meta and real memory, so a real ``t`` is recorded as a constant."""
    target, value = args
    with DisableTorchFunction():
        if recorded(target) is not None and recorded(value) is None and not value.is_meta:
            value = recorder.constant(value.detach())
        elif recorded(target) is None and not target.is_meta and recorded(value) is not None:
            value = recorder.look_at(value)
        if isinstance(value, RecordedTensor) and not isinstance(target, RecordedTensor):
            value = value._meta
        elif isinstance(target, RecordedTensor) and not isinstance(value, RecordedTensor) and (like := recorded(value)):
            value = make_recorded_tensor(value, like.device)
        if recorded(target) is not None and recorded(value) is not None and _packs(target, value):
            recorder.tape.made_of[recorder.ref(value).storage] = recorder.ref(target)
        func(target, value)
        if isinstance(target, RecordedTensor) and isinstance(value, RecordedTensor):
            with DisableTorchDispatch():
                target._meta, target._claimed = value._meta.detach(), value._claimed


def _packs(target: Tensor, value: Tensor) -> bool:
    """Return whether a parameter of a class of its own takes values of another shape or dtype: its own, packed."""
    is_own = class_of(target) not in (Tensor, torch.nn.Parameter) and not is_lazy(target)
    return is_own and (target.size(), target.dtype) != (value.size(), value.dtype)


def _get_data(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``t.data``, also of a lazy tensor, which asks it for the device that it is to get its memory on."""
    with DisableTorchFunction():
        data = func(*args)
        found = None if isinstance(data, RecordedTensor) else recorded(data)
        return data if found is None else make_recorded_tensor(data, found.device)


HANDLERS: dict[Any, Handler] = {
    Tensor.tolist: _with_true_value,
    Tensor.numpy: _with_true_value,
    Tensor.__array__: _with_true_value,
    Tensor.__format__: _with_true_value,
    Tensor.__dlpack__: _with_true_value,
    Tensor.__dlpack_device__: _with_true_value,
    Tensor.untyped_storage: _untyped_storage,
    Tensor.__getitem__: _index,
    Tensor.__setitem__: _index,
    Tensor.new_tensor: _new_tensor,
    Tensor.new: _new_tensor,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
