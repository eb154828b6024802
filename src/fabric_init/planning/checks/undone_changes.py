"""Find changes that the model's own code has made to base weights, and that a declared load would undo.

A block that builds a model and changes it is loaded as plain PyTorch would load it: when all is built. For an init that
is right, whatever it computes. It is not where an adapter's constructor takes something out of the weights for its own
tensors (PiSSA), or truncates them (KaSA): peft does that to weights that are loaded. That the checkpoint is one of the
weights before the change is told by the adapter's tensors, which it does not have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.derived import cast_from
from fabric_init.planning.plan import Action, PlanEntry
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.liveness import is_final, live_ops, writes_whole
from fabric_init.recording.tape.op_properties import mixes, only_copies
from fabric_init.recording.tape.tape import Op, Tape, TensorRef


def check_nothing_is_undone(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> None:
    """Check that no loaded parameter replaces one that was changed together with tensors that are not loaded.

    Raises:
        CheckpointMismatchError: Some do; the message names the first.
    """
    initialized = [e.slot for e in entries if e.slot.ref is not None and e.slot.saved and e.action is Action.INIT]
    loaded = [
        (entry.slot, entry.slot.ref)
        for entry in entries
        # buffers may follow one another in a circle, as spectral_norm's do
        if entry.action is Action.LOAD and entry.slot.kind == "parameter" and entry.slot.ref is not None
    ]
    if not initialized or not loaded:
        return
    computed = list(_computed_from(initialized, loaded, tapes))
    if computed:
        raise CheckpointMismatchError(
            f"the model's own code has computed {len(computed)} tensors that the checkpoint would replace "
            f"({computed[0]} first) from tensors that the checkpoint does not bring, so the two would not fit "
            f"together. {_MEND}"
        )
    changed = list(_changed(initialized, loaded, tapes))
    if changed:
        raise CheckpointMismatchError(
            f"the model's own code has changed {len(changed)} tensors ({changed[0]} first) after it made others from "
            "them or beside them, which the checkpoint does not bring, and the checkpoint would undo that change. "
            f"{_MEND}"
        )


_MEND = "Load the checkpoint before that code runs: build the model in one init_module block, and change it in another."


def _computed_from(
    initialized: Sequence[TensorInfo], loaded: Sequence[tuple[TensorInfo, TensorRef]], tapes: Mapping[int, Tape]
) -> Iterator[str]:
    """Yield the names of loaded parameters that were computed from tensors that are not loaded.

    PiSSA takes what it puts into the adapters out of the base weight; loading the base weight afterwards would count
    that twice. So both go back to one tensor, and one of them goes through the other.
    """
    fresh = {slot.ref.storage for slot in initialized if slot.ref is not None}
    for tape in set(tapes.values()):
        here = {storage for storage in fresh if storage in tape.storages}
        computed = _computed_out_of(here, tape)
        for slot, ref in loaded:
            if ref.storage in computed:
                beside = live_ops(tape, [ref.storage], exact=False, inputs=here)  # what it has not from those
                if any(beside & live_ops(tape, [storage], exact=False) for storage in here):
                    yield slot.name


def _computed_out_of(fresh: set[int], tape: Tape) -> set[int]:
    """Return the storages that are computed from those in ``fresh``, other than as mere copies."""
    copied = fresh | {cast.storage for storage in fresh for cast in cast_from(storage, tape)}
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


def _changed(
    initialized: Sequence[TensorInfo], loaded: Sequence[tuple[TensorInfo, TensorRef]], tapes: Mapping[int, Tape]
) -> Iterator[str]:
    """Yield the names of loaded parameters that were changed when tensors that are not loaded had been made for them.

    Beside those, KaSA truncates weights; from their values before the change LoftQ takes its adapters. An init computes
    with its own random numbers as well, but at once: nothing else has been made of them, or in between.
    """
    own = {
        storage
        for _, ref in loaded
        for storage in (ref.storage, *(cast.storage for cast in cast_from(ref.storage, tapes[ref.storage])))
    }
    made = [
        (slot, _ops_of(tapes[slot.ref.storage], slot.ref.storage, inputs=own))
        for slot in initialized
        if slot.ref is not None
    ]
    taken_from = {op.number for _, ops in made if any(mixes(op.func) for op in ops) for op in ops}
    for slot, ref in loaded:
        ops = _ops_of(tapes[ref.storage], ref.storage)
        if _last_draw(ops) in taken_from:
            yield slot.name
        elif any(mixes(op.func) for op in ops):
            around = slot.name.rpartition(".")[0].rpartition(".")[0]
            beside = [its for other, its in made if not around or other.name.startswith(f"{around}.")]
            if _is_changed_after([op.number for its in beside for op in its], ops, ref, tapes[ref.storage]):
                yield slot.name


def _is_changed_after(made: Sequence[int], ops: Sequence[Op], ref: TensorRef, tape: Tape) -> bool:
    """Return whether linear algebra has changed what was drawn for a parameter once one of the ops ``made`` had run.

    Scaling, casting and normalizing is init at any time.
    """
    for op in ops:
        for read in op.reads() if mixes(op.func) else ():
            drawn = _last_draw(_ops_of(tape, read.storage, before=op.number))
            same_size = read.size.numel() == ref.size.numel()
            if same_size and drawn is not None and any(drawn < number < op.number for number in made):
                return True
    return False


def _ops_of(tape: Tape, storage: int, *, before: int | None = None, inputs: Collection[int] = ()) -> list[Op]:
    """Return the ops whose results go into a storage, the last one first; arguments as for :func:`live_ops`.

    Of earlier draws from the same stream, which are live as well, none goes into it.
    """
    found, needed = [], {storage}
    for number in sorted(live_ops(tape, [storage], exact=False, before=before, inputs=inputs), reverse=True):
        op = tape.ops[number]
        if any(ref.storage in needed for ref in (*op.targets, *op.outputs)):
            found.append(op)
            needed.update(
                ref.storage
                for ref in op.reads()
                if ref.storage not in inputs or not is_final(tape, ref.storage, number)
            )
    return found


def _last_draw(ops: Sequence[Op]) -> int | None:
    return max((op.number for op in ops if op.draw is not None), default=None)
