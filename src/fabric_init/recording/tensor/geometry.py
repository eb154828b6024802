"""Change the shape, strides and storage of a recorded tensor in place, which stays the same tensor for C++ as well."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, make_recorded_tensor, meta_of


def may_change(tensor: Tensor) -> None:
    """Let an operator that is about to run change the geometry of ``tensor``; :func:`follow_meta` comes after it."""
    if isinstance(tensor, RecordedTensor):
        tensor._twin = tensor._twin.own()


def same_geometry(tensor: Tensor, other: Tensor) -> bool:
    """Return whether the elements of two tensors are arranged alike."""
    return tensor.size() == other.size() and tensor.stride() == other.stride()


def resize(tensor: RecordedTensor, like: Tensor) -> None:
    """Arrange the elements of ``tensor``, which is about to be overwritten, as those of ``like`` are."""
    may_change(tensor)
    tensor._meta.resize_(like.size()).as_strided_(like.size(), like.stride())
    follow_meta(tensor)


def follow_meta(tensor: RecordedTensor) -> None:
    """Take the storage and geometry that ``tensor._meta`` has by now: an operator changed them in place.

    The tensor in C++ stays the same one: functions that are made of operators, such as ``torch.stft``, go on with it.
    """
    like = make_recorded_tensor(tensor._meta, tensor._claimed)
    tensor._twin = like._twin
    with DisableTorchFunction():
        tensor.data = like


def view_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Run an operator that makes its first argument, a recorded tensor, a view of what it was."""
    tensor: Tensor = args[0]
    may_change(tensor)
    with DisableTorchDispatch():
        func(meta_of(tensor), *args[1:], **kwargs)
    if isinstance(tensor, RecordedTensor):
        follow_meta(tensor)
    return tensor
