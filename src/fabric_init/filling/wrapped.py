"""Fill wrappers: what they hold is computed, by the tape, from the plain tensor that they were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fabric_init._torch_internals import swap_tensor_impl
from fabric_init.filling.derived import laid_out
from fabric_init.recording.replay import real_execution, replay_with, view
from fabric_init.recording.storage_tags import ref_of
from fabric_init.recording.tape import TensorRef
from fabric_init.recording.tensor import RecordedTensor, become, meta_of, recorded
from fabric_init.recording.wrappers import inner_tensors, is_sharded, recorded_parts
from fabric_init.reports.registry import RowRecord
from fabric_init.sharding.wrapped import Wrapped


class InnerValues:
    """What the wrappers of a model hold, between the time it is computed and the model gets it.

    Args:
        wrapped: By position in a plan: what is made of that tensor.
    """

    def __init__(self, wrapped: Mapping[int, Wrapped]) -> None:
        self._wrapped = wrapped
        self._values: list[tuple[RecordedTensor, Tensor]] = []

    def take(self, position: int, value: Tensor, device: torch.device, *, exact: bool) -> bool:
        """Compute what is made of a tensor with this ``value``, which nothing here keeps.

        Returns:
            Whether the model holds the tensor itself as well.
        """
        made = self._wrapped.get(position)
        if made is None:
            return True
        recordings = [(part, recorded(part)) for each in made.wrappers.values() for part in recorded_parts(each)]
        parts = [(part, found.storage) for part, found in recordings if found is not None and found.memory is None]
        with real_execution():
            known = {made.plain.storage: _memory(value, made.plain, device)}
            storages = {storage for _, storage in parts}
            memories = replay_with(made.tape, storages, known, exact=exact, to=lambda _: device)
            for part, storage in parts:
                self._values.append((part, view(memories[storage], ref_of(meta_of(part), storage))))
        return made.kept

    def put(self, filled: list[Tensor]) -> None:
        """Give the wrappers their values, and put them into a list of what the model holds by now."""
        for part, value in self._values:
            become(part, value)
        for position, made in self._wrapped.items():
            for wrapper in made.wrappers.values():
                follow_inner(wrapper)
                filled[position] = filled[position] if made.kept else wrapper

    def note(self, rows: Sequence[RowRecord]) -> None:
        """Say in the rows of a report what was made of tensors."""
        for position, made in self._wrapped.items():
            kinds = dict.fromkeys(type(wrapper).__name__ for wrapper in made.wrappers.values())
            rows[position].update(origin=f"{rows[position].row.origin}, made into {' and '.join(kinds)}")


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
