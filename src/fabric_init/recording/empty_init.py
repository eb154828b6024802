"""The context that records and skips: no init kernel runs and no weight memory is taken inside it.

``_EmptyInit``, a ``TorchFunctionMode``, sees what Python code calls: whole init functions, questions such as
``tensor.device``, and values that leave torch (``tolist``, ``numpy``). Under it the
:class:`~fabric_init.recording.recorder.Recorder` sees every op that those calls come down to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, FunctionType, TracebackType
from typing import Any

import torch
import torch.utils._device as _default_device
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from fabric_init.recording.collector import PausedCollector
from fabric_init.recording.operators import INIT_FUNCTIONS
from fabric_init.recording.provenance import init_call
from fabric_init.recording.recorder import Recorder
from fabric_init.recording.tape import Rng, Tape, begin, recorded

_Handler = Callable[["_EmptyInit", Any, tuple[Any, ...], dict[str, Any]], Any]
# The init functions that hand over to a function mode; the others are known by their frame.
_SEEN_WHOLE: dict[str, Any] = {
    name: INIT_FUNCTIONS[name] for name in ("uniform_", "normal_", "constant_", "kaiming_uniform_")
}
_TRUNC_NORMAL = torch.nn.init._no_grad_trunc_normal_.__code__


class _EmptyInit(TorchFunctionMode):
    """Record how a model would be built, and build it without values.

    Inside, tensors are on the meta device but answer as if they were on the device they were asked for. Code that
    needs a value (``.item()``, ``.tolist()``, ``if t.any()``) gets the true one, by replaying just that tensor.

    Args:
        rng: how random numbers will be drawn at replay; see :func:`deferred_init`.
    """

    def __init__(self, rng: Rng = "per_op") -> None:
        super().__init__()
        self.tape = Tape(rng)
        self.recorder = Recorder(self.tape)
        self._collector = PausedCollector()

    def __enter__(self) -> Self:
        self._collector.__enter__()
        self.recorder.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self.recorder.__exit__(kind, error, trace)
        self._collector.__exit__(kind, error, trace)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs or {})
        if type(func) is FunctionType and (original := _replaced(func, sys._getframe(2))) is not None:
            return _init_function(self, original, args, kwargs or {})
        if not kwargs:
            return func(*args)
        if (device := kwargs.get("device")) is not None and torch.device(device).type == "meta":
            with torch._C._DisableTorchDispatch():  # the model wants this one to stay on meta
                return func(*args, **kwargs)
        return func(*args, **kwargs)


# -- whole init functions ----------------------------------------------------------------------------------------------


def _replaced(func: FunctionType, asking: FrameType) -> FunctionType | None:
    """The init function that is asking, when it does so under another function's name.

    torch.nn.init looks its own name up when it hands over, so where somebody replaced that (transformers does while it
    initialises) the replacement arrives here, though the original was called.
    """
    original = _SEEN_WHOLE.get(func.__name__)
    return original if original is not None and asking.f_code is original.__code__ else None


def _init_function(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rest = dict(kwargs)
    tensor: Tensor = rest.pop("tensor", None) if "tensor" in rest else args[0]
    with torch._C.DisableTorchFunction():
        if recorded(tensor) is None or not _recordable(func, tensor):
            return func(tensor, **rest)  # eager code's own warnings and errors
        mode.recorder.add_init(func, tensor, rest, sys._getframe(2))
    return tensor


def _recordable(func: Any, tensor: Tensor) -> bool:
    return tensor.numel() > 0 and (
        tensor.dim() >= 2
        if func is torch.nn.init.kaiming_uniform_
        else tensor.is_floating_point() or tensor.is_complex()
    )


def _is_meta(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    with torch._C.DisableTorchFunction():
        if recorded(args[0]) is None:
            return bool(args[0].is_meta)
        caller = sys._getframe(2)
        if caller.f_code is _TRUNC_NORMAL and (call := init_call(caller)) is not None:
            # torch skips sampling on meta, and could not run its rejection loop there: take the call as a whole
            mode.recorder.record_init_frame(call)
            return True
    return False


# -- questions about where a tensor lives ------------------------------------------------------------------------------


def _device(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    with torch._C.DisableTorchFunction():
        found = recorded(args[0])
        return args[0].device if found is None else found.device


def _is_device_type(kind: str) -> _Handler:
    def handler(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return _device(mode, func, args, kwargs).type == kind

    return handler


def _get_device(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    device = _device(mode, func, args, kwargs)
    return -1 if device.type == "cpu" else device.index or 0


def _data_ptr(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    # code compares addresses to find shared memory, so they must differ exactly where the memory will
    with torch._C.DisableTorchFunction():
        tensor = args[0]
        if recorded(tensor) is None:
            return int(tensor.data_ptr())
        return int(tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size())


def _to(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            like = recorded(other)
            device = other.device if like is None else like.device
            dtype = other.dtype
            non_blocking = positional[1] if len(positional) > 1 else rest.get("non_blocking", False)
        else:
            parsed: tuple[Any, ...] = torch._C._nn._parse_to(*positional, **rest)
            device, dtype, non_blocking, _ = parsed
        same = device in (None, found.device, torch.device(found.device.type))
        options: dict[str, Any] = {"dtype": dtype or args[0].dtype, "non_blocking": non_blocking, "copy": copy}
        if not same:
            options["device"] = device
        if memory_format is not None:
            options["memory_format"] = memory_format
        return Tensor.to(args[0], **options)


def _cpu(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _to(mode, Tensor.to, (args[0], torch.device("cpu")), kwargs)


def _cuda(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    rest = dict(kwargs)
    where = rest.pop("device", args[1] if len(args) > 1 else None)
    device = torch.device("cuda", where) if isinstance(where, int) else torch.device(where or "cuda")
    return _to(mode, Tensor.to, (args[0], device), rest)


# -- values that leave or enter torch ----------------------------------------------------------------------------------


def _with_true_value(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunction():
        if recorded(args[0]) is None:
            return func(*args, **kwargs)
        real = mode.recorder.true_value(args[0])
    result = func(real, *args[1:], **kwargs)
    if hasattr(result, "flags"):
        result.flags.writeable = False  # a write to this array could not reach the recorded tensor: numpy refuses it
    return result


def _set_data(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``p.data = t``. torch refuses to mix meta with real memory, so a real ``t`` enters the tape as a constant."""
    target, value = args
    with torch._C.DisableTorchFunction():
        if recorded(target) is not None and not value.is_meta:
            value = mode.recorder.constant(value.detach())
        elif recorded(target) is None and recorded(value) is not None:
            value = mode.recorder.true_value(value)
        func(target, value)


def _empty(mode: _EmptyInit, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Room without values needs no op. Most parameters begin so, hence this shortcut past the dispatcher."""
    device = kwargs.get("device") or _default_device.CURRENT_DEVICE or _CPU
    if type(device) is not torch.device:
        device = torch.device(device)
    if device.type == "meta" or not _PLAIN_OPTIONS.issuperset(kwargs):
        return func(*args, **kwargs)
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        tensor = func(*args, **{**kwargs, "device": _META})
        begin(tensor, mode.tape, device)
    return tensor


_PLAIN_OPTIONS = frozenset({"size", "dtype", "device", "requires_grad", "memory_format"})

_CPU, _META = torch.device("cpu"), torch.device("meta")

_HANDLERS: dict[Any, _Handler] = {
    **dict.fromkeys(_SEEN_WHOLE.values(), _init_function),
    torch.empty: _empty,
    Tensor.is_meta.__get__: _is_meta,  # type: ignore[attr-defined]
    Tensor.device.__get__: _device,
    Tensor.is_cpu.__get__: _is_device_type("cpu"),  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: _is_device_type("cuda"),  # type: ignore[attr-defined]
    Tensor.get_device: _get_device,
    Tensor.data_ptr: _data_ptr,
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.cuda: _cuda,
    Tensor.tolist: _with_true_value,
    Tensor.numpy: _with_true_value,
    Tensor.__array__: _with_true_value,
    Tensor.data.__set__: _set_data,  # type: ignore[attr-defined]
}


def active() -> _EmptyInit | None:
    """The recording that is open in this thread, if one is."""
    return next((mode for mode in reversed(_function_modes()) if isinstance(mode, _EmptyInit)), None)


def _function_modes() -> list[TorchFunctionMode]:
    from torch.overrides import _get_current_function_mode_stack

    modes: list[TorchFunctionMode] = _get_current_function_mode_stack()
    return modes


@contextmanager
def deferred_init(*, rng: Rng = "per_op") -> Iterator[None]:
    """Build models in this block without running init kernels or taking memory for weights.

    What the constructors would have done is recorded; :func:`fabric_init.materialize` does it afterwards, once for
    each tensor, or loads the tensor instead. A block inside another one continues the outer recording.

    Args:
        rng: where random numbers will come from. ``"per_op"``: each random op has a generator of its own, so a tensor
            gets the same values whatever else is loaded, on every rank, and tensors can be filled in parallel.
            ``"eager"``: all ops draw from one stream in order, dead ones too: bit-identical to plain PyTorch from the
            same seed. Both depend on the seed that torch's default generator has when the block opens.

    Raises:
        RecordingError: in the block, when a constructor does something that cannot be recorded.
    """
    if active() is not None:
        yield
        return
    with _EmptyInit(rng):
        yield
