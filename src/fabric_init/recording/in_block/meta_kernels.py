"""Results of ops on the meta device, and traversal of the tensors among an op's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fabric_init.recording.tape.op_properties import PLAIN_FACTORIES, has_out, traits
from fabric_init.recording.tensor.geometry import follow_meta
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, make_recorded_tensor, meta_of, recorded

META = torch.device("meta")


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the tape can describe ``tensor``: strided, and neither nested nor quantized."""
    return tensor.layout == torch.strided and not tensor.is_nested and tensor.dtype not in _QUANTIZED


_QUANTIZED = frozenset({torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4})


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a contiguous one like it if elements share memory (stride 0)."""
    if is_dense(tensor) and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.size(), strict=True)
    ):
        return torch.empty(tensor.size(), dtype=tensor.dtype, device=META)
    return tensor


def like_on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return a new meta tensor with the shape, strides and dtype of ``tensor``."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


def pointwise_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return a pointwise op's result on meta without its meta kernel, or ``None`` if an input is not contiguous.

    Meta kernels of pointwise ops are Python. Asking the CPU kernel for the result dtype on empty tensors is about a
    hundred times faster.
    """
    tensors = list(tensors_in((args, kwargs.values())))
    if not all(tensor.is_contiguous() for tensor in tensors) or traits(func).has_device:
        return None
    probe_args, probe_kwargs = map_tensors(
        (args, kwargs), lambda tensor: torch.ones((0,) if tensor.dim() else (), dtype=tensor.dtype)
    )
    probe = func(*probe_args, **probe_kwargs)
    return torch.empty(torch.broadcast_shapes(*(t.size() for t in tensors)), dtype=probe.dtype, device=META)


def as_on_cpu(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Return the ``result`` of a meta kernel, which knows what CUDA does, arranged as by the kernel of the CPU."""
    name = traits(func).name
    others = name in _BY_COLUMNS_ON_CPU or name in _OTHERWISE_ON_CPU
    if not others or has_out(func) or args[0].device.type not in ("cpu", "meta"):
        return result
    if name in _BY_COLUMNS_ON_CPU:
        values = list(result)
        position = _BY_COLUMNS_ON_CPU[name]
        values[position] = torch.empty_like(values[position].mT.contiguous()).mT
        return tuple(values)
    zeros = map_tensors(args, lambda t: torch.empty_strided(t.size(), t.stride(), dtype=t.dtype).zero_())
    return map_tensors(func(*zeros), like_on_meta)


_BY_COLUMNS_ON_CPU = {"aten::_linalg_svd": 2, "aten::linalg_eig": 1}
_OTHERWISE_ON_CPU = frozenset(
    f"aten::{name}" for name in ("_fft_r2c", "_fft_c2r", "_fft_c2c", "max_unpool2d", "multilabel_margin_loss_forward")
)


def plain_shape(func: Any, args: tuple[Any, ...]) -> Sequence[int] | None:
    """Return the shape of a factory's result if its arguments state it, else ``None``."""
    name = traits(func).name
    if has_out(func):
        return None
    if name in PLAIN_FACTORIES and len(args) == 1:
        shape: Sequence[int] = args[0]
        return shape
    if name == "aten::arange" and all(type(value) is int for value in args) and 0 not in args[2:]:
        return (len(range(*args)),)
    return None


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that the call writes in place."""
    op_traits = traits(func)
    if op_traits.training is not None and args[op_traits.training : op_traits.training + 1] == (False,):
        return []
    return [
        tensor
        for position, name in op_traits.written
        for tensor in tensors_in((args[position] if position < len(args) else kwargs.get(name),))
    ]


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested lists and tuples, in order."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)) or type(value) is type({}.values()):
            yield from tensors_in(value)


def map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Return ``value``, which may be nested, with ``change`` applied to each tensor in it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) is dict:
        return {name: map_tensors(item, change) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(items) if type(value) in (list, tuple) else type(value)(*items)
    return value


def run_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an op returns on the meta tensors beside its arguments."""

    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = meta_of(value)
            return value if value.is_meta or value.dim() == 0 else like_on_meta(value)
        if type(value) in (list, tuple):
            return type(value)([meta(item) for item in value])
        return value

    if (shape := plain_shape(func, args)) is not None and kwargs.get("layout") in (None, torch.strided):
        integers = traits(func).name == "aten::arange"
        return torch.empty(shape, dtype=kwargs.get("dtype") or (torch.int64 if integers else None), device=META)
    if traits(func).pointwise and (result := pointwise_result(func, args, kwargs)) is not None:
        return result
    kwargs = {name: meta(value) for name, value in kwargs.items() if name not in ("pin_memory", "generator")}
    if traits(func).has_device:
        kwargs["device"] = META
    if traits(func).takes_generator:
        kwargs["generator"] = None
    result = as_on_cpu(func, args, func(*(meta(value) for value in args), **kwargs))
    return map_tensors(result, lambda tensor: dense(tensor) if recorded(tensor) is None else tensor)


def recorded_results(result: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """Return what an op on meta tensors has returned as recorded tensors; the ``tensors`` passed in stay themselves."""
    passed = {id(meta_of(tensor)): tensor for tensor in tensors}

    def wrapped(meta: torch.Tensor) -> torch.Tensor:
        tensor = passed.get(id(meta))
        if tensor is None:
            recording = recorded(meta)
            return meta if recording is None else make_recorded_tensor(meta, recording.device)
        if isinstance(tensor, RecordedTensor) and (meta.size() != tensor.size() or meta.stride() != tensor.stride()):
            follow_meta(tensor)
        return tensor

    return map_tensors(result, wrapped)
