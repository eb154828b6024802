"""Note on the tape what loads bring, for what is computed from that later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import is_collective, read
from fabric_init.checkpoints.storage.remote import AnyPath
from fabric_init.errors import RecordingError
from fabric_init.filling.values.loaded_memory import memory_with
from fabric_init.planning.derived import LoadedStorages, loaded_storages
from fabric_init.planning.plan import Loaded
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.recorded_load.record import RecordedReader
from fabric_init.recording.replay.replay import Brought, all_on
from fabric_init.recording.tape.tape import LoadedStorage, Tape, now

_CPU = torch.device("cpu")


@contextmanager
def loads_noted(prepared: PreparedPlan) -> Iterator[LoadedStorages]:
    """Let what is computed later from the tensors that a plan loads be computed from their values in the checkpoint.

    That is what code of later blocks computes or looks at, and what is kept outside of modules. If the context fails,
    it is taken back. Yields the :func:`loaded_storages` of the plan.
    """
    reader, since = prepared.reader, now()
    noted: list[tuple[Tape, int]] = []
    loaded = loaded_storages(prepared.plan, prepared.tapes)
    if reader is not None:
        tapes = {tape.current() for tape in prepared.tapes.values()}
        for storage, there in loaded.items():
            tape = next(tape for tape in tapes if storage in tape.storages)
            tape.loaded[storage] = LoadedStorage(since, _later(storage, there, reader))
            noted.append((tape, storage))
    try:
        yield loaded
    except BaseException:
        for tape, storage in noted:
            tape.loaded.pop(storage, None)
        raise


def _later(storage: int, there: Sequence[Loaded], reader: CheckpointReader) -> Callable[[Tape], torch.UntypedStorage]:
    """Return what makes the memory of a storage, given the tape: the tape keeps it, so it must not keep the tape."""
    reads = {each.key: _reading(reader, each.key) for each in there}

    def made(tape: Tape) -> torch.UntypedStorage:
        others = Brought(tape, all_on(_CPU), but={storage})
        values = [(each, reads[each.key](tape)) for each in there]
        return memory_with(values, storage, tape, others, _CPU, exact=tape.rng == "eager")

    return made


def _reading(reader: CheckpointReader, key: str) -> Callable[[Tape], Tensor]:
    if is_collective(reader):
        path = reader.path
        return lambda _: _refuse_alone(path, key)
    if isinstance(reader, RecordedReader):
        return reader.reading(key)
    return lambda _: read(reader, key)


def _refuse_alone(path: AnyPath, key: str) -> NoReturn:
    raise RecordingError(
        f"a value that is computed from {key} is asked for, and {path} is read by all ranks together, which this one "
        "cannot do alone. Declare the load with io='local' in the strategy."
    )
