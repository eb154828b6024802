"""Compute tensors that the constructor derives from loaded ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import is_collective, read
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import RecordingError
from fabric_init.planning.derived import loaded_in_parts, loaded_storages
from fabric_init.planning.plan import DerivedFrom
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.recorded_load.record import RecordedReader
from fabric_init.recording.replay.replay import real_execution, replay_with, view
from fabric_init.recording.tape.tape import LoadedStorage, Tape, TensorRef, now


@contextmanager
def loads_noted(prepared: PreparedPlan) -> Iterator[Mapping[int, DerivedFrom]]:
    """Let what is computed later from the tensors that a plan loads be computed from their values in the checkpoint.

    That is what code of later blocks computes or looks at, and what is kept outside of modules. If the context fails,
    it is taken back. Yields the :func:`loaded_storages` of the plan.
    """
    reader, since = prepared.reader, now()
    noted: list[tuple[Tape, int]] = []
    loaded = loaded_storages(prepared.plan, prepared.tapes)
    if reader is not None:
        reads = {storage: _whole(ref, _reading(reader, key)) for storage, (ref, key) in loaded.items()}
        for storage, sources in loaded_in_parts(prepared.plan, loaded, prepared.tapes).items():
            reads[storage] = _in_parts(storage, [(ref, _reading(reader, key)) for ref, key in sources])
        tapes = {tape.current() for tape in prepared.tapes.values()}
        for storage, its in reads.items():
            tape = next(tape for tape in tapes if storage in tape.storages)
            tape.loaded[storage] = LoadedStorage(since, its)
            noted.append((tape, storage))
    try:
        yield loaded
    except BaseException:
        for tape, storage in noted:
            tape.loaded.pop(storage, None)
        raise


_Read = Callable[[Tape], Tensor]
"""Reads a tensor, given the tape: the tape keeps it, so it must not keep the tape."""


def _reading(reader: CheckpointReader, key: str) -> _Read:
    if is_collective(reader):
        path = reader.path
        return lambda _: _refuse_alone(path, key)
    if isinstance(reader, RecordedReader):
        return reader.reading(key)
    return lambda _: read(reader, key)


def _whole(ref: TensorRef, value: _Read) -> Callable[[Tape], torch.UntypedStorage]:
    """Return what reads the storage that ``ref`` spans."""
    return lambda tape: laid_out(value(tape).reshape(ref.size), ref, torch.device("cpu"))


def _in_parts(storage: int, parts: Sequence[tuple[TensorRef, _Read]]) -> Callable[[Tape], torch.UntypedStorage]:
    """Return what computes a storage by the model's own init, and reads ``parts`` of it."""

    def made(tape: Tape) -> torch.UntypedStorage:
        cpu = torch.device("cpu")
        memory = replay_with(tape, [storage], {}, exact=tape.rng == "eager", to=lambda _: cpu)[storage]
        for ref, part in parts:
            if ref.expanded:
                raise RecordingError(
                    f"a value is computed from a tensor of shape {tuple(ref.size)} whose elements share memory in the "
                    "model and are loaded one by one. Compute it after the load, or clone() the expanded tensor."
                )
            view(memory, ref).copy_(part(tape).reshape(ref.size))
        return memory

    return made


def _refuse_alone(path: AnyPath, key: str) -> NoReturn:
    raise RecordingError(
        f"a value that is computed from {key} is asked for, and {path} is read by all ranks together, which this one "
        "cannot do alone. Declare the load with io='local' in the strategy."
    )


def compute(
    storages: Collection[int],
    tape: Tape,
    sources: Iterable[tuple[TensorRef, Tensor]],
    device: torch.device,
    *,
    exact: bool = False,
) -> dict[int, torch.UntypedStorage]:
    """Return ``storages``, computed together from these values of their ``sources``."""
    with real_execution():
        known = {ref.storage: _as_it_is(value, ref, device) for ref, value in sources}
        return replay_with(tape, storages, known, exact=exact, to=lambda _: device)


def _as_it_is(value: Tensor, ref: TensorRef, device: torch.device) -> torch.UntypedStorage:
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
