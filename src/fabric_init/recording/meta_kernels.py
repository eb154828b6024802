"""Results of ops on the meta device, and traversal of the tensors among an op's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fabric_init.recording.op_schemas import PLAIN_FACTORIES, traits

META = torch.device("meta")


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the tape can describe ``tensor``: strided and not quantized."""
    return tensor.layout == torch.strided and not tensor.is_quantized


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor``, or a contiguous one like it if elements share memory (stride 0)."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.size(), strict=True)):
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


def column_major(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Return the ``result`` of a meta kernel with the matrix column by column that the kernel of the CPU puts so.

    Meta kernels of decompositions know what CUDA does.
    """
    position = _BY_COLUMNS_ON_CPU.get(traits(func).name)
    if position is None or args[0].device.type not in ("cpu", "meta"):
        return result
    values = list(result)
    values[position] = torch.empty_like(values[position].mT.contiguous()).mT
    return tuple(values)


_BY_COLUMNS_ON_CPU = {"aten::_linalg_svd": 2, "aten::linalg_eig": 1}


def plain_shape(func: Any, args: tuple[Any, ...]) -> Sequence[int] | None:
    """Return the shape of a factory's result if its arguments state it, else ``None``."""
    name = traits(func).name
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
