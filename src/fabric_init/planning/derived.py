"""Find tensors that the constructor computes from tensors of the checkpoint, such as DoRA's magnitudes.

They are computed from what the checkpoint brings, and copies (``copy.deepcopy`` of a layer) are copies of that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.plan import Action, DerivedFrom, Plan, PlanEntry, storage_groups
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.liveness import computed_from, covers, is_final, live_ops, writes_whole
from fabric_init.recording.op_schemas import is_cast, only_copies
from fabric_init.recording.tape import Tape, TensorRef


def loaded_storages(plan: Plan, tapes: Mapping[int, Tape]) -> dict[int, DerivedFrom]:
    """Return the storages that are loaded in full, and those that they were cast from."""
    loaded = dict(plan.sources)
    for storage, positions in storage_groups(plan.entries).items():
        loads = [plan.entries[position] for position in positions if plan.entries[position].action is Action.LOAD]
        ref = loads[0].slot.ref if loads else None
        if len(loads) == 1 and ref is not None and covers(tapes[storage], ref):  # others on it are views of that one
            loaded[storage] = DerivedFrom(ref, loads[0].keys[0])
    for storage, source in list(loaded.items()):
        for earlier in _cast_from(storage, tapes[storage]) if storage in tapes else ():
            loaded.setdefault(earlier.storage, source._replace(ref=earlier))
    return loaded


def _cast_from(storage: int, tape: Tape) -> Iterator[TensorRef]:
    """Yield the storages that a storage was cast from.

    ``model.to(dtype)`` makes new storages; tensors that were computed before read the old ones.
    """
    while True:
        writers = [tape.ops[number] for number in tape.writers.get(storage, ())]
        if len(writers) != 1 or not is_cast(writers[0].func):
            return
        (read,) = writers[0].reads()
        if not is_final(tape, read.storage, writers[0].number) or not covers(tape, read):
            return
        storage = read.storage
        yield read


def sources_of(
    entry: PlanEntry, tapes: Mapping[int, Tape], others: Collection[int], *, exact: bool = False
) -> set[int]:
    """Return which of the storages ``others`` the model's own init computes a tensor from."""
    ref = entry.slot.ref
    if ref is None or entry.action is not Action.INIT or not others:
        return set()
    return computed_from(tapes[ref.storage], ref.storage, others, copies=True, exact=exact)


def check_nothing_is_undone(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> None:
    """Check the reverse: no loaded tensor replaces one that was computed from tensors that are not loaded.

    PiSSA takes what it puts into the adapters out of the base weight; loading the base weight afterwards would count
    that twice. So both go back to one tensor, and one of them goes through the other.

    Raises:
        CheckpointMismatchError: Some do; the message names the first.
    """
    initialized = [e for e in entries if e.slot.ref is not None and e.slot.saved and e.action is Action.INIT]
    fresh = {e.slot.ref.storage for e in initialized if e.slot.ref is not None}
    if not fresh:
        return
    undone = []
    for tape in set(tapes.values()):
        here = {storage for storage in fresh if storage in tape.storages}
        computed = _computed_out_of(here, tape)
        for slot, action, *_ in entries:
            # buffers may follow one another in a circle, as spectral_norm's do
            if action is Action.LOAD and slot.kind == "parameter" and slot.ref and slot.ref.storage in computed:
                beside = live_ops(tape, [slot.ref.storage], exact=False, inputs=here)  # what it has not from those
                if any(beside & live_ops(tape, [storage], exact=False) for storage in here):
                    undone.append(slot.name)
    if undone:
        raise CheckpointMismatchError(
            f"the model's own code has computed {len(undone)} tensors that the checkpoint would replace ({undone[0]} "
            "first) from tensors that the checkpoint does not bring, so the two would not fit together. Load the "
            "checkpoint before that code runs: build the model in one init_module block, and change it in another."
        )


def replaced_since(entry: PlanEntry, slot: TensorInfo, tapes: Mapping[int, Tape]) -> bool:
    """Return whether the planned tensor of ``entry`` has another storage now, and was not only cast."""
    was, ref = entry.slot.ref, slot.ref
    if was is None or ref is None or ref.storage == was.storage:
        return False
    return all(cast.storage != was.storage for cast in _cast_from(ref.storage, tapes[ref.storage]))


def written_since(entry: PlanEntry, tapes: Mapping[int, Tape]) -> bool:
    """Return whether a later block has written in place to a tensor whose load was declared before."""
    ref, since = entry.slot.ref, entry.since
    if ref is None or since is None:
        return False
    tape = tapes[ref.storage]
    earlier = [ref.storage, *(cast.storage for cast in _cast_from(ref.storage, tape))]
    numbers = [number for storage in earlier for number in tape.writers.get(storage, ())]
    return any(number > since and not is_cast(tape.ops[number].func) for number in numbers)


def _computed_out_of(fresh: set[int], tape: Tape) -> set[int]:
    """Return the storages that are computed from those in ``fresh``, other than as mere copies."""
    copied = fresh | {cast.storage for storage in fresh for cast in _cast_from(storage, tape)}
    computed: set[int] = set()
    for number in sorted(tape.ops):
        op = tape.ops[number]
        reads = {ref.storage for ref in op.reads()}
        for storage in {ref.storage for ref in (*op.targets, *op.outputs)} - fresh:
            if reads & computed or (reads & copied and not only_copies(op.func)):
                computed.add(storage)
            elif reads & copied:
                copied.add(storage)
            elif writes_whole(tape, op, storage):
                computed.discard(storage)
    return computed
