"""Fill wrappers: what they hold is computed, by the tape, from the plain tensor that they were made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fabric_init._torch_internals import swap_tensor_impl
from fabric_init.filling.derived import laid_out
from fabric_init.recording.replay import real_execution, replay_all_with, view
from fabric_init.recording.storage_tags import ref_of
from fabric_init.recording.tape import TensorRef
from fabric_init.recording.tensor import RecordedTensor, become, meta_of, recorded
from fabric_init.recording.wrappers import inner_tensors, is_sharded, recorded_parts
from fabric_init.sharding.wrapped import Wrapped


class InnerValues:
    """The values of the tensors in some wrappers, between the time they are computed and the model gets them."""

    def __init__(self) -> None:
        self._values: list[tuple[RecordedTensor, Tensor]] = []
        self._wrappers: list[Tensor] = []

    def compute(self, wrapped: Wrapped, value: Tensor, device: torch.device, *, exact: bool) -> None:
        """Compute what the wrappers hold from the ``value`` of the plain tensor, which nothing here keeps."""
        parts: list[tuple[RecordedTensor, int]] = []
        for wrapper in wrapped.wrappers.values():
            parts += [(p, found.storage) for p in recorded_parts(wrapper) if (found := recorded(p)) and not found.memory]
            self._wrappers.append(wrapper)
        with real_execution():
            known = {wrapped.plain.storage: _memory(value, wrapped.plain, device)}
            storages = {storage for _, storage in parts}
            memories = replay_all_with(wrapped.tape, storages, known, exact=exact, to=lambda _: device)
            for part, storage in parts:
                self._values.append((part, view(memories[storage], ref_of(meta_of(part), storage))))

    def put(self) -> None:
        """Give the tensors in the wrappers their values."""
        for part, value in self._values:
            become(part, value)
        for wrapper in self._wrappers:
            follow_inner(wrapper)


def _memory(value: Tensor, ref: TensorRef, device: torch.device) -> torch.UntypedStorage:
    """Return the memory of ``value`` if it is laid out as the tape has it, and a copy otherwise."""
    storage = value.untyped_storage()
    alike = (value.stride(), value.storage_offset(), value.dtype) == (ref.stride, ref.offset, ref.dtype)
    if alike and storage.nbytes() == ref.nbytes and value.device == device:
        return storage
    return laid_out(value, ref, device)


def follow_inner(wrapper: Tensor) -> None:
    """Let a wrapper, which stays the same object, be on the device that the tensors in it are on by now."""
    if is_sharded(wrapper):
        return  # its mesh says where it is
    inner, (_, context) = inner_tensors(wrapper), wrapper.__tensor_flatten__()  # type: ignore[attr-defined]
    device = next(iter(inner.values())).device
    if wrapper.device == device:
        return
    for name, tensor in inner.items():
        if tensor.device != device:  # one that was not recorded
            inner[name] = tensor.to(device)
            setattr(wrapper, name, inner[name])
    moved = type(wrapper).__tensor_unflatten__(inner, context, wrapper.size(), wrapper.stride())  # type: ignore[attr-defined]
    swap_tensor_impl(wrapper, moved.requires_grad_(wrapper.requires_grad))
