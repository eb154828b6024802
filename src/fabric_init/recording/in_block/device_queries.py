"""Device queries: recorded tensors are on meta for torch, but report the device that the constructor asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction, default_device, parse_to
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.tensor.recorded_tensor import new_tensor, recorded

Handler = Callable[[Recorder, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Replaces one function in a function mode: (recorder, function, args, kwargs) → the result."""

_CPU, _META = torch.device("cpu"), torch.device("meta")
_PLAIN_OPTIONS = frozenset({"size", "dtype", "device", "requires_grad", "memory_format"})


def on_device_by_name(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a call with ``device=…``.

    ``device="meta"`` is passed through unrecorded. A call for a GPU is recorded on meta, so that torch does not start
    the driver or create a context.
    """
    device = kwargs["device"]
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "meta":
        with DisableTorchDispatch():
            return func(*args, **kwargs)
    if device.type == "cpu":
        return func(*args, **kwargs)
    with recorder.intended_device(device):
        return func(*args, **{**kwargs, "device": _META})


def _empty(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``torch.empty`` past the dispatcher: it writes nothing, so there is no op to record.

    Most parameters start this way, so the shortcut pays off.
    """
    device = kwargs.get("device") or default_device.CURRENT_DEVICE or _CPU
    if type(device) is not torch.device:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type == "meta":
        return on_device_by_name(recorder, func, args, {**kwargs, "device": device})
    if not _PLAIN_OPTIONS.issuperset(kwargs):
        return func(*args, **kwargs)
    options = {**kwargs, "device": _META}
    requires_grad = options.pop("requires_grad", False)
    with DisableTorchFunction(), DisableTorchDispatch():
        return new_tensor(func(*args, **options), recorder.tape, device, requires_grad)


def _filled(op: Any) -> Handler:
    """Return a handler that writes ``op``, a factory of one value, to the tape without going through the dispatcher."""

    def handler(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device") or default_device.CURRENT_DEVICE or _CPU
        if type(device) is not torch.device or device.type != "cpu" or not _PLAIN_OPTIONS.issuperset(kwargs):
            return (
                func(*args, **kwargs)
                if kwargs.get("device") is None
                else on_device_by_name(recorder, func, args, kwargs)
            )
        with DisableTorchFunction(), DisableTorchDispatch():
            requires_grad = kwargs.get("requires_grad", False)
            meta = torch.empty(*args, **{**kwargs, "device": _META, "requires_grad": False})
            tensor = new_tensor(meta, recorder.tape, device, requires_grad)
            options = {"dtype": meta.dtype, "device": device}
            recorder.add(op, (meta.size(),), options, (), (recorder.ref(tensor),), sys._getframe(2))
            return tensor

    return handler


def _get_device(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    device = args[0].device
    return -1 if device.type == "cpu" else device.index or 0


def _to(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``tensor.to(…)`` by the recorded device: without a change of device or dtype it returns the tensor itself."""
    with DisableTorchFunction():
        recording = recorded(args[0])
        if recording is None:
            return func(*args, **kwargs)
        keywords = dict(kwargs)
        positional = list(args[1:])
        other = keywords.pop("other", positional[0] if positional else None)
        copy_at = 2 if isinstance(other, (Tensor, torch.dtype)) else 3
        copy = positional.pop(copy_at) if len(positional) > copy_at else keywords.pop("copy", False)
        memory_format = keywords.pop("memory_format", None)
        if isinstance(other, Tensor):
            device, dtype = other.device, other.dtype
            non_blocking = positional[1] if len(positional) > 1 else keywords.get("non_blocking", False)
        else:
            parsed: tuple[Any, ...] = parse_to(*positional, **keywords)
            device, dtype, non_blocking, _ = parsed
        options: dict[str, Any] = {"dtype": dtype or args[0].dtype, "non_blocking": non_blocking}
        if memory_format is not None:
            options["memory_format"] = memory_format
        if device in (None, recording.device, torch.device(recording.device.type)):
            return Tensor.to(args[0], copy=copy, **options)
        return torch.ops.aten._to_copy.default(args[0], device=device, **options)  # Tensor.to would start the driver


def _cpu(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _to(recorder, Tensor.to, (args[0], _CPU), kwargs)


def _cuda(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    keywords = dict(kwargs)
    target = keywords.pop("device", args[1] if len(args) > 1 else None)
    device = torch.device("cuda", target) if isinstance(target, int) else torch.device(target or "cuda")
    return _to(recorder, Tensor.to, (args[0], device), keywords)


LATER_HANDLERS: dict[Any, Handler] = {
    Tensor.get_device: _get_device,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
}
"""Those that also answer when no block is open."""

HANDLERS: dict[Any, Handler] = {
    torch.empty: _empty,
    torch.ones: _filled(torch.ops.aten.ones.default),
    torch.zeros: _filled(torch.ops.aten.zeros.default),
    Tensor.get_device: _get_device,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
}
