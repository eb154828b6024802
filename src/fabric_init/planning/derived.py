"""Find tensors that the constructor computes from tensors of the checkpoint, such as DoRA's magnitudes.

They are computed from what the checkpoint brings, and copies (``copy.deepcopy`` of a layer) are copies of that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from fabric_init.planning.plan import Action, DerivedFrom, Plan, PlanEntry, storage_groups
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.liveness import computed_from, covers, is_final
from fabric_init.recording.tape.op_properties import is_cast
from fabric_init.recording.tape.tape import Tape, TensorRef


def loaded_storages(plan: Plan, tapes: Mapping[int, Tape]) -> dict[int, DerivedFrom]:
    """Return the storages that are loaded in full, and those that they were cast from."""
    loaded = dict(plan.sources)
    for plain in (entry.made_of for entry in plan.entries if entry.made_of is not None):
        if plain.action is Action.LOAD and (ref := plain.slot.ref) is not None and covers(tapes[ref.storage], ref):
            loaded[ref.storage] = DerivedFrom(ref, plain.keys[0])
    for storage, positions in storage_groups(plan.entries).items():
        loads = [plan.entries[position] for position in positions if plan.entries[position].action is Action.LOAD]
        ref = loads[0].slot.ref if loads else None
        if len(loads) == 1 and ref is not None and covers(tapes[storage], ref):  # others on it are views of that one
            loaded[storage] = DerivedFrom(ref, loads[0].keys[0])
    for storage, source in list(loaded.items()):
        for earlier in cast_from(storage, tapes[storage]) if storage in tapes else ():
            loaded.setdefault(earlier.storage, source._replace(ref=earlier))
    return loaded


def loaded_in_parts(plan: Plan, whole: Collection[int], tapes: Mapping[int, Tape]) -> dict[int, list[DerivedFrom]]:
    """Return the loaded tensors on each storage that several share, or one does not span: none of ``whole``.

    So for a storage that they were cast from.
    """
    parts: dict[int, list[DerivedFrom]] = {}
    for entry in plan.entries:
        ref = entry.slot.ref
        if entry.action is Action.LOAD and ref is not None:
            tape = tapes[ref.storage]
            for each in (ref, *(_casts(ref.storage, tape) if covers(tape, ref) else ())):
                if each.storage not in whole:
                    parts.setdefault(each.storage, []).append(DerivedFrom(each, entry.keys[0]))
    return parts


def cast_from(storage: int, tape: Tape) -> Iterator[TensorRef]:
    """Yield the storages that a storage was cast from.

    ``model.to(dtype)`` makes new storages; tensors that were computed before read the old ones.
    """
    return (read for read in _casts(storage, tape) if covers(tape, read))


def _casts(storage: int, tape: Tape) -> Iterator[TensorRef]:
    """Yield them, and at last the part of a storage that the first of them was cast from."""
    while True:
        writers = tape.writers.get(storage, ())
        if len(writers) != 1 or not is_cast((writer := tape.ops[writers[0]]).func):
            return
        (read,) = writer.reads()
        if not is_final(tape, read.storage, writer.number):
            return
        yield read
        if not covers(tape, read):
            return
        storage = read.storage


def sources_of(
    entry: PlanEntry, tapes: Mapping[int, Tape], others: Collection[int], *, exact: bool = False
) -> set[int]:
    """Return which of the storages ``others`` the model's own init computes a tensor from."""
    ref = entry.slot.ref
    if ref is None or entry.action is not Action.INIT or not others:
        return set()
    return computed_from(tapes[ref.storage], ref.storage, others, copies=True, exact=exact)


def replaced_since(entry: PlanEntry, slot: TensorInfo, tapes: Mapping[int, Tape]) -> bool:
    """Return whether the planned tensor of ``entry`` has another storage now, and was not only cast."""
    was, ref = entry.slot.ref, slot.ref
    if was is None or ref is None or ref.storage == was.storage:
        return False
    return all(cast.storage != was.storage for cast in cast_from(ref.storage, tapes[ref.storage]))


def written_since(entry: PlanEntry, tapes: Mapping[int, Tape]) -> bool:
    """Return whether a later block has written in place to a tensor whose load was declared before."""
    ref, since = entry.slot.ref, entry.since
    if ref is None or since is None:
        return False
    tape = tapes[ref.storage]
    earlier = [ref.storage, *(cast.storage for cast in cast_from(ref.storage, tape))]
    numbers = [number for storage in earlier for number in tape.writers.get(storage, ())]
    return any(number > since and not is_cast(tape.ops[number].func) for number in numbers)
