"""Find tensors that the constructor computes from tensors of the checkpoint, such as DoRA's magnitudes.

They are computed from what the checkpoint brings, and copies (``copy.deepcopy`` of a layer) are copies of that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile

from fabric_init.planning.plan import Action, Conversion, Loaded, Plan, PlanEntry
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.liveness import computed_from, covers, is_conversion, is_final
from fabric_init.recording.tape.tape import Tape, TensorRef

LoadedStorages = Mapping[int, Sequence[Loaded]]
"""By storage what a load brings there, in the order of loading: one tensor that spans it, or parts of it."""


def loaded_storages(plan: Plan, tapes: Mapping[int, Tape]) -> LoadedStorages:
    """Return the storages of loaded tensors, and those that these were converted from.

    A tensor of the state dict has the values that the load brings for itself, whatever was converted from it.
    """
    plain = [entry.made_of for entry in plan.entries if entry.made_of is not None]
    found: dict[int, dict[TensorRef, Loaded]] = {}
    for ref, key, _ in (*plan.sources, *_loads(plain), *_loads(plan.entries)):
        there = found.setdefault(ref.storage, {})
        there.pop(ref, None)  # the last one comes last
        there[ref] = Loaded(ref, key)
    own = found.keys() | {entry.slot.ref.storage for entry in plan.entries if entry.slot.ref and entry.slot.saved}
    loaded = {storage: list(there.values()) for storage, there in found.items()}
    for each in [each for there in loaded.values() for each in there if each.ref.storage in tapes]:
        for storage, converted in _converted_from(each, tapes[each.ref.storage]):
            if storage in own:
                break
            loaded.setdefault(storage, []).append(converted)
    return loaded


def _loads(entries: Iterable[PlanEntry]) -> Iterator[Loaded]:
    for entry in entries:
        if entry.action is Action.LOAD and entry.slot.ref is not None:
            yield Loaded(entry.slot.ref, entry.keys[0])


def _converted_from(loaded: Loaded, tape: Tape) -> Iterator[tuple[int, Loaded]]:
    """Yield the storages that a loaded tensor was converted from, and where on them it is."""
    for made in _conversions(loaded.ref.storage, tape):
        if not loaded.conversions and (loaded.ref.conj or loaded.ref.neg or loaded.ref.dtype != made.written.dtype):
            return  # a view that shows the bits as other values
        loaded = loaded._replace(conversions=(made, *loaded.conversions))
        yield made.read.storage, loaded


def _conversions(storage: int, tape: Tape) -> Iterator[Conversion]:
    """Yield how a storage was converted from another one, and so on."""
    while len(writers := tape.writers.get(storage, [])) == 1 and is_conversion(op := tape.ops[writers[0]]):
        read, written = op.reads(), op.outputs
        if len(read) != 1 or len(written) != 1 or read[0].conj or read[0].neg:
            return
        storage = read[0].storage
        if not is_final(tape, storage, op.number):
            return
        yield Conversion(written[0], read[0])


def cast_from(storage: int, tape: Tape) -> Iterator[TensorRef]:
    """Yield the storages that a whole storage was converted from.

    ``model.to(dtype)`` makes new storages; tensors that were computed before read the old ones.
    """
    return takewhile(lambda read: covers(tape, read), (made.read for made in _conversions(storage, tape)))


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
    return any(number > since and not is_conversion(tape.ops[number]) for number in numbers)
