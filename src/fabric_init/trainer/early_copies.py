"""What callbacks of a Trainer, and others, have computed from its model before that was filled.

In ``setup``, where callbacks that average or prune copy the model, Lightning's own models have values. So what was
recorded there is computed from the values that the fill brings, as the tape has it: a write after a copy is not in the
copy, and a transposed copy is transposed. It is whole on each rank, however the strategy keeps the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from fabric_init.planning.tensors import registered_tensors
from fabric_init.recording.tape.tape import Tape
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.recording.tensor.storage_tags import StorageTag
from fabric_init.recording.tensor.wrappers import recorded_parts


@contextmanager
def copies_filled(model: nn.Module) -> Iterator[None]:
    """Context that fills ``model``; all that was computed from it alone before has its values afterwards."""
    awaited = {tape: tape.after_block.waiting.missing(own) for tape, own in _storages(model).items()}
    yield
    for earlier, storages in awaited.items():
        tape = earlier.current()
        filled = [each for each in storages if each in tape.overruled or not tape.is_alive(each)]
        for storage in _computed_from(tape, filled):
            tape.after_block.waiting.forget(storage)
        tape.after_block.waiting.accept_fill(filled)
        tape.after_block.finish(())


def has_copies(model: nn.Module) -> bool:
    """Return whether something that is no parameter or buffer of ``model`` waits for values of it alone."""
    return any(
        set(_computed_from(tape, tape.after_block.waiting.missing(own))) - own for tape, own in _storages(model).items()
    )


def _storages(model: nn.Module) -> dict[Tape, set[int]]:
    """Return the storages of parameters and buffers of ``model`` that have no values yet, by tape."""
    found: dict[Tape, set[int]] = {}
    for _, _, tensor in registered_tensors(model):
        for tag in map(recorded, recorded_parts(tensor)):
            if tag is not None and tag.memory is None:
                found.setdefault(tag.tape, set()).add(tag.storage)
    return found


def _computed_from(tape: Tape, storages: Iterable[int]) -> list[int]:
    """Return what is still in use of the storages that wait for nothing but ``storages``."""
    given = set(storages)
    tags: list[StorageTag] = [tag for record in list(tape.records.values()) if (tag := record()) is not None]
    waiting = ((tag.storage, tape.after_block.waiting.missing([tag.storage])) for tag in tags if tag.memory is None)
    return [storage for storage, missing in waiting if missing and given.issuperset(missing)]
