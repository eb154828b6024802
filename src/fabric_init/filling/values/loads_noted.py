"""Note on the tape what loads bring, for what is computed from that later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
    loaded = loaded_storages(prepared.plan, prepared.tapes)
    tapes = {tape.current() for tape in prepared.tapes.values()}
    if prepared.reader is not None:
        since, reading = now(), _reading(prepared.reader, {each.key for there in loaded.values() for each in there})
        for tape in tapes:
            for storage in filter(tape.storages.__contains__, loaded):
                tape.loaded[storage] = LoadedStorage(since, partial(_made, storage, loaded[storage], reading))
    try:
        yield loaded
    except BaseException:
        for tape in tapes:
            for storage in loaded:
                tape.loaded.pop(storage, None)
        raise


_Reading = Callable[[str, Tape], Tensor]
"""What reads a key, given the tape: the tape keeps it, so it must not keep the tape."""


def _made(storage: int, there: Sequence[Loaded], reading: _Reading, tape: Tape) -> torch.UntypedStorage:
    """Return the memory of a storage with what a load brings there."""
    others = Brought(tape, all_on(_CPU), but={storage})
    values = [(each, reading(each.key, tape)) for each in there]
    return memory_with(values, storage, tape, others, _CPU, exact=tape.rng == "eager")


def _reading(reader: CheckpointReader, keys: Iterable[str]) -> _Reading:
    if is_collective(reader):
        path = reader.path
        return lambda key, _: _refuse_alone(path, key)
    if isinstance(reader, RecordedReader):
        reads = {key: reader.reading(key) for key in keys}
        return lambda key, tape: reads[key](tape)
    return lambda key, _: read(reader, key)


def _refuse_alone(path: AnyPath, key: str) -> NoReturn:
    raise RecordingError(
        f"a value that is computed from {key} is asked for, and {path} is read by all ranks together, which this one "
        "cannot do alone. Declare the load with io='local' in the strategy."
    )
