"""Functions by which values enter tensors from Python, and tensors take the place of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.recording.in_block.device_queries import Handler
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, class_of, make_recorded_tensor, recorded


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


def _plain_items(recorder: Recorder, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if recorded(value) is None else recorder.look_at(value)
    return type(value)([_plain_items(recorder, item) for item in value]) if type(value) in (list, tuple) else value


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
        tensor = torch.tensor(_plain_items(recorder, data), dtype=dtype, device=device)
        return tensor.requires_grad_() if kwargs.get("requires_grad") else tensor


def _tensor(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``torch.tensor([a, b])`` on true values: torch reads recorded scalars in a list without calling a mode."""
    with DisableTorchFunction():
        if args and type(args[0]) in (list, tuple):
            args = (_plain_items(recorder, args[0]), *args[1:])
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
    Tensor.__getitem__: _index,
    Tensor.__setitem__: _index,
    Tensor.new_tensor: _new_tensor,
    Tensor.new: _new_tensor,
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    Tensor.data.__get__: _get_data,  # type: ignore[attr-defined]
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}
