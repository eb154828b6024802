"""Recorded tensors answer for the device that they were asked for, though torch keeps them on meta."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._device as _default_device
from torch import Tensor

from fabric_init.errors import RecordingError
from fabric_init.recording.recorder import Recorder
from fabric_init.recording.tape import begin
from fabric_init.recording.tensor import RecordedTensor, recorded, recorded_tensor

Handler = Callable[[Recorder, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Stands in for one function that a function mode was shown: (recorder, function, args, kwargs) → its result."""

_CPU, _META = torch.device("cpu"), torch.device("meta")
_PLAIN_OPTIONS = frozenset({"size", "dtype", "device", "requires_grad", "memory_format"})


def on_device_by_name(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with ``device=…``. On meta it is none of our business; on any other, torch must not start its driver."""
    device = kwargs["device"]
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "meta":
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)
    if device.type == "cpu":
        return func(*args, **kwargs)
    with recorder.asked_for(device):
        return func(*args, **{**kwargs, "device": _META})


def _empty(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Room without values needs no op. Most parameters begin so, hence this shortcut past the dispatcher."""
    device = kwargs.get("device") or _default_device.CURRENT_DEVICE or _CPU
    if type(device) is not torch.device:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "meta":
        return on_device_by_name(recorder, func, args, {**kwargs, "device": device})
    if not _PLAIN_OPTIONS.issuperset(kwargs):
        return func(*args, **kwargs)
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        requires_grad = kwargs.get("requires_grad", False)
        tensor = func(*args, **{**kwargs, "device": _META, "requires_grad": False})
        begin(tensor, recorder.tape, device)
        return recorded_tensor(tensor, device, requires_grad)


def _filled(op: Any) -> Handler:
    """The same shortcut for memory of one value, whose op goes straight to the tape."""

    def handler(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device") or _default_device.CURRENT_DEVICE or _CPU
        if type(device) is not torch.device or device.type != "cpu" or not _PLAIN_OPTIONS.issuperset(kwargs):
            return (
                func(*args, **kwargs)
                if kwargs.get("device") is None
                else on_device_by_name(recorder, func, args, kwargs)
            )
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            requires_grad = kwargs.get("requires_grad", False)
            tensor = torch.empty(*args, **{**kwargs, "device": _META, "requires_grad": False})
            ref = recorder.new_storage(tensor, device)
            recorder.add(op, (tensor.size(),), {"dtype": tensor.dtype, "device": device}, (), (ref,), sys._getframe(2))
            return recorded_tensor(tensor, device, requires_grad)

    return handler


def _get_device(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    device = args[0].device
    return -1 if device.type == "cpu" else device.index or 0


def _data_ptr(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    # code compares addresses to find shared memory, so they must differ exactly where the memory will
    with torch._C.DisableTorchFunction():
        tensor = args[0]
        if not isinstance(tensor, RecordedTensor):
            return int(tensor.data_ptr())
        return int(tensor._meta.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size())


def _address(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Where the values are: whoever asks when no block is open means to read them."""
    return recorder.true_value(args[0]).data_ptr()


def _to(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``tensor.to(device)`` is the tensor itself when that is where it lives already."""
    with torch._C.DisableTorchFunction():
        found = recorded(args[0])
        if found is None:
            return func(*args, **kwargs)
        rest = dict(kwargs)
        positional = list(args[1:])
        other = rest.pop("other", positional[0] if positional else None)
        copy_at = 2 if isinstance(other, (Tensor, torch.dtype)) else 3
        copy = positional.pop(copy_at) if len(positional) > copy_at else rest.pop("copy", False)
        memory_format = rest.pop("memory_format", None)
        if isinstance(other, Tensor):
            device, dtype = other.device, other.dtype
            non_blocking = positional[1] if len(positional) > 1 else rest.get("non_blocking", False)
        else:
            parsed: tuple[Any, ...] = torch._C._nn._parse_to(*positional, **rest)
            device, dtype, non_blocking, _ = parsed
        options: dict[str, Any] = {"dtype": dtype or args[0].dtype, "non_blocking": non_blocking}
        if memory_format is not None:
            options["memory_format"] = memory_format
        if device in (None, found.device, torch.device(found.device.type)):
            return Tensor.to(args[0], copy=copy, **options)
        return torch.ops.aten._to_copy.default(args[0], device=device, **options)  # Tensor.to would start a driver


def _cpu(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _to(recorder, Tensor.to, (args[0], _CPU), kwargs)


def _cuda(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rest = dict(kwargs)
    where = rest.pop("device", args[1] if len(args) > 1 else None)
    device = torch.device("cuda", where) if isinstance(where, int) else torch.device(where or "cuda")
    return _to(recorder, Tensor.to, (args[0], device), rest)


def _autocast(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        known = [found for arg in args if isinstance(arg, Tensor) and (found := recorded(arg)) is not None]
        if known and torch.is_autocast_enabled(known[0].device.type):
            raise RecordingError(
                f"{func.__name__} under torch.autocast in a recorded constructor: autocast does not see recorded "
                "tensors, so the result would be of another dtype. Run the model after the block instead."
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

LATER_HANDLERS: dict[Any, Handler] = {
    Tensor.get_device: _get_device,
    Tensor.data_ptr: _address,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
}
"""Those that also answer when no block is open."""

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(_AUTOCAST, _autocast),
    torch.empty: _empty,
    torch.ones: _filled(torch.ops.aten.ones.default),
    torch.zeros: _filled(torch.ops.aten.zeros.default),
    Tensor.get_device: _get_device,
    Tensor.data_ptr: _data_ptr,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
}
