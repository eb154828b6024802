"""The memory of storages with what a load brings there, from which the constructor computes other tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import RecordingError
from fabric_init.planning.derived import LoadedStorages
from fabric_init.planning.plan import Loaded
from fabric_init.planning.rank_loads import read_as
from fabric_init.recording.replay.replay import Brought, DeviceMap, all_on, real_execution, replay_with, view
from fabric_init.recording.tape.liveness import covers
from fabric_init.recording.tape.tape import Tape, TensorRef


class LoadedMemory(Mapping[int, torch.UntypedStorage]):
    """The memory of storages with what loads bring there, of which each is made once, when it is asked for.

    Ranks that compute the same ask for the same ones in the same order: reading may be for all of them together.

    Args:
        tape: The tape of the storages.
        loaded: What the present load brings, on this tape and others.
        reader: Its checkpoint, if there is one.
        to: The device to make memory on, by the one that the constructor asked for.
        exact: Whether random streams are replayed in order.
    """

    def __init__(
        self, tape: Tape, loaded: LoadedStorages, reader: CheckpointReader | None, to: DeviceMap, *, exact: bool
    ) -> None:
        self._tape, self._reader, self._to, self._exact = tape, reader, to, exact
        self._loaded = {} if reader is None else {each: loaded[each] for each in loaded if each in tape.storages}
        self._earlier = Brought(tape, to, but=self._loaded)
        self._made: dict[int, torch.UntypedStorage] = {}
        self._hidden: frozenset[int] = frozenset()

    def __getitem__(self, storage: int) -> torch.UntypedStorage:
        if not self._is_loaded(storage):
            return self._earlier[storage]
        if storage not in self._made:
            assert self._reader is not None
            values = [(each, read_as(self._reader, each.key, each.ref.size, None)) for each in self._loaded[storage]]
            others, device = self.without({storage}), self._to(self._tape.storages[storage].device)
            self._made[storage] = memory_with(values, storage, self._tape, others, device, exact=self._exact)
        return self._made[storage]

    def __contains__(self, storage: object) -> bool:
        return self._is_loaded(storage) or storage in self._earlier

    def __iter__(self) -> Iterator[int]:
        yield from filter(self._is_loaded, self._loaded)
        yield from self._earlier

    def __len__(self) -> int:
        return len(list(iter(self)))

    def without(self, storages: Collection[int]) -> LoadedMemory:
        """Return the same, as if the present load brought nothing for ``storages``."""
        other = copy.copy(self)
        other._hidden = self._hidden.union(storages)
        return other

    def release(self) -> None:
        """Keep no memory alive; what is asked for again is made again."""
        self._made.clear()
        self._earlier.clear()

    def _is_loaded(self, storage: object) -> bool:
        return storage in self._loaded and storage not in self._hidden


def memory_with(
    values: Sequence[tuple[Loaded, Tensor]],
    storage: int,
    tape: Tape,
    others: Mapping[int, torch.UntypedStorage],
    device: torch.device,
    *,
    exact: bool,
) -> torch.UntypedStorage:
    """Return the memory of a storage, on ``device``, with the ``values`` that a load brings there, in their order.

    The model's own init gives the rest its values. The memory is only to be read: it may be that of a file.

    Args:
        values: Loaded tensors, at least one, each with its value.
        storage: The number of the storage.
        tape: Its tape.
        others: The memory of other storages that loads bring, from which the own init may compute.
        device: The device.
        exact: Whether random streams are replayed in order.

    Raises:
        RecordingError: Several values are brought for one element.
    """
    with real_execution():
        brought = [(each, value.reshape(each.ref.size)) for each, value in values]
        first, value = brought[0]
        place = _place(first)
        if place is not None and covers(tape, place):
            if not brought[1:]:
                return as_it_is(value, place, device)
            memory = laid_out(value, place, device)
        else:
            memory = replay_with(tape, [storage], others, exact=exact, to=all_on(device))[storage]
        _write(brought, memory)
        if first.conversions:
            _check_one_value(brought, memory)
    return memory


_Value = tuple[Loaded, Tensor]


def _write(brought: Iterable[_Value], memory: torch.UntypedStorage) -> None:
    for each, value in brought:
        elements, at = _elements(each, memory)
        elements[at] = value.to(elements)


def _check_one_value(brought: Sequence[_Value], memory: torch.UntypedStorage) -> None:
    """Check that ``memory`` has the values of each storage that was converted from it, of which it has one.

    Raises:
        RecordingError: It has not.
    """
    for storage in {each.ref.storage for each, _ in brought}:
        its = [(each, value) for each, value in brought if each.ref.storage == storage]
        again = memory.clone()
        _write(its, again)  # changes nothing, also where several loaded tensors share what was converted
        last, value = its[-1]
        elements, at = _elements(last, memory)
        is_there = torch.allclose(elements[at], value.to(elements), 0, 0, equal_nan=True)
        if not is_there or not torch.equal(_bytes(again), _bytes(memory)):
            raise RecordingError(
                "a value is computed from a tensor that the model's own code has converted more than once, by to(), "
                f"contiguous() or reshape(), and the load brings different values for it: {last.key} and others. "
                "Compute it from one of these, or after the load."
            )


def _bytes(memory: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)


def _place(loaded: Loaded) -> TensorRef | None:
    """Return where on a storage a loaded tensor is, if that can be said in one view."""
    place = loaded.ref
    for written, read in reversed(loaded.conversions):
        if written.stride != read.stride:
            return None
        offset = place.offset + read.offset - written.offset
        place = place._replace(storage=read.storage, offset=offset, dtype=read.dtype)
    return place


def _elements(loaded: Loaded, memory: torch.UntypedStorage) -> tuple[Tensor, Tensor | EllipsisType]:
    """Return a tensor on the memory of a storage, and the index by which it has what is loaded there."""
    place = _place(loaded)
    if place is not None:
        if place.expanded:
            raise RecordingError(
                f"a value is computed from a tensor of shape {tuple(place.size)} whose elements share memory in the "
                "model and are loaded one by one. Compute it after the load, or clone() the expanded tensor."
            )
        return view(memory, place), ...
    elements = torch.empty(0, dtype=loaded.conversions[0].read.dtype, device=memory.device).set_(memory)
    index = torch.arange(len(elements), device=memory.device)
    numbers = index.untyped_storage()
    for written, read in loaded.conversions:
        taken = view(numbers, read._replace(dtype=index.dtype))
        numbers = laid_out(taken, written._replace(dtype=index.dtype), memory.device)
    return elements, view(numbers, loaded.ref._replace(dtype=index.dtype))


def as_it_is(value: Tensor, ref: TensorRef, device: torch.device) -> torch.UntypedStorage:
    """Return the memory of ``value`` if it is laid out as the tape has it, and a copy otherwise: it is only read."""
    storage = value.untyped_storage()
    alike = (value.stride(), value.storage_offset(), value.dtype) == (ref.stride, ref.offset, ref.dtype)
    if alike and storage.nbytes() == ref.nbytes and value.device == device:
        return storage
    return laid_out(value, ref, device)


def laid_out(value: Tensor, ref: TensorRef, device: torch.device) -> torch.UntypedStorage:
    """Return ``value`` in memory of its own, laid out like ``ref``, which spans a storage."""
    memory = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype, device=device)
    return memory.copy_(value).untyped_storage()
