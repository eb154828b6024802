"""Plans that were made when recorded blocks ended, brought up to what the user has done to the model since."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.mapping.combined import CombinedReader
from fabric_init.errors import RecordingError
from fabric_init.guard.waiting_tensors import release_filled
from fabric_init.planning.checks.validation import check_all_have_values
from fabric_init.planning.derived import loaded_storages, replaced_since, sources_of, written_since
from fabric_init.planning.matching import action_without_checkpoint
from fabric_init.planning.plan import Action, Loaded, Plan, PlanEntry
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import TensorInfo, tensors_and_tapes
from fabric_init.recording.tape.liveness import computed_from
from fabric_init.recording.tape.tape import Tape


def merged(plans: Sequence[PreparedPlan], model: nn.Module, initialized: Collection[int] = frozenset()) -> PreparedPlan:
    """Return one plan for ``model`` as it is today: as if it had been filled when each block ended, and changed since.

    Tensors are known by identity, so modules may have been moved, wrapped or renamed, and models of several blocks put
    together. What the user has loaded, written or put into the model since stands; a recorded tensor of another block
    gets its own init.

    Args:
        plans: in the order of their blocks; a later load wins.
        model: whose tensors they are about.
        initialized: ids of tensors that were to get their own init before a load was declared for them.

    Raises:
        RecordingError: a tensor that is to be loaded was written in part, or in a later block; or two blocks load it,
            and others are computed from it.
        UninitializedTensorError: a tensor that came since has neither values nor a recorded init.
    """
    release_filled(model)
    infos, tensors, found = tensors_and_tapes(model)
    tapes = dict(found)
    for tape in set(tapes.values()):
        tape.after_block.kept.check()
    readers = [plan.reader for plan in plans if plan.reader is not None]
    combined = CombinedReader(readers) if readers else None
    reader: CheckpointReader | None = combined if len(readers) > 1 else readers[0] if readers else None
    if combined is not None and len(combined) == 1:
        reader = readers[0]  # which may have a way of its own to load all
    planned = _by_tensor(plans, combined)
    entries = []
    for info, tensor in zip(infos, tensors, strict=True):
        entry = planned.get(id(tensor))
        if entry is not None and _is_made_of(entry, info, tapes):
            entries.append(entry._replace(slot=entry.slot._replace(names=info.names)))
        elif entry is None or replaced_since(entry, info, tapes):
            entries.append(PlanEntry(info, action_without_checkpoint(info, tapes)))
        elif info.real and not (entry.slot.real and _is_as_planned(plans, tensor)):
            entries.append(PlanEntry(info, Action.KEEP))
        elif _is_overwritten(entry, info.ref.storage if info.ref else None, tapes):
            entries.append(PlanEntry(info, Action.INIT))
        else:
            entries.append(entry._replace(slot=info))
    check_all_have_values(entries, tapes, reader)
    _refuse_lost_changes(entries, tapes)
    unexpected = tuple(key for plan in plans for key in plan.plan.unexpected)
    notes = tuple(dict.fromkeys(note for plan in plans for note in plan.plan.notes))
    plan = Plan(tuple(entries), unexpected, _sources(planned.values(), plans), notes)
    _refuse_two_values(plan, tensors, tapes, _given(plans, initialized))
    exact = any(plan.exact for plan in plans) or {tape.rng for tape in tapes.values()} == {"eager"}
    return PreparedPlan(plan, tensors, tapes, reader, exact)


def planned_tensors(plans: Sequence[PreparedPlan]) -> set[int]:
    """Return the ids of the tensors that the plans are about."""
    return {id(tensor) for plan in plans for tensor in plan.tensors}


def declared_at(prepared: PreparedPlan) -> int:
    """Return when the load of a plan was declared, among the numbers of ops: a later load wins."""
    return max((entry.since or 0 for entry in prepared.plan.entries), default=0)


def _is_made_of(entry: PlanEntry, info: TensorInfo, tapes: dict[int, Tape]) -> bool:
    """Return whether a tensor that is to be loaded by now holds what was computed from that, as when packed."""
    if entry.action is not Action.LOAD or not replaced_since(entry, info, tapes):
        return False
    assert info.ref is not None
    assert entry.slot.ref is not None
    storage, was = info.ref.storage, entry.slot.ref.storage
    tapes[was] = tapes[storage]
    return bool(computed_from(tapes[storage], storage, [was], copies=True))


def _is_as_planned(plans: Sequence[PreparedPlan], tensor: Tensor) -> bool:
    """Return whether a tensor that had values when it was planned for has not been written since."""
    return all(tensor._version == version for plan in plans for held, version in plan.versions if held is tensor)


def _is_overwritten(entry: PlanEntry, storage: int | None, tapes: Mapping[int, Tape]) -> bool:
    return (
        storage is not None
        and entry.since is not None
        and tapes[storage].after_block.waiting.written_since(storage, entry.since)
    )


def _by_tensor(plans: Sequence[PreparedPlan], reader: CombinedReader | None) -> dict[int, PlanEntry]:
    found: dict[int, PlanEntry] = {}
    for plan in plans:
        for entry, tensor in zip(plan.plan.entries, plan.tensors, strict=True):
            if entry.action is Action.LOAD:
                assert plan.reader is not None
                assert reader is not None
                found[id(tensor)] = entry._replace(keys=tuple(reader.key(plan.reader, key) for key in entry.keys))
            else:
                found.setdefault(id(tensor), entry)
    return found


def _sources(entries: Iterable[PlanEntry], plans: Sequence[PreparedPlan]) -> tuple[Loaded, ...]:
    """Return what was to be loaded when the blocks ended, also where the model holds something else by now."""
    tapes = {storage: tape for plan in plans for storage, tape in plan.tapes.items()}
    return tuple(
        Loaded(ref, entry.keys[0])
        for entry in entries
        if entry.action is Action.LOAD and (ref := entry.slot.ref) is not None
        if not tapes[ref.storage].current().written_since(ref.storage, entry.since or 0)
    )


def _given(plans: Sequence[PreparedPlan], initialized: Collection[int]) -> dict[int, set[tuple[str, ...]]]:
    """Return what tensors, by id, were to get one after the other: the keys of files, or nothing for their own init."""
    given: dict[int, set[tuple[str, ...]]] = {each: {()} for each in initialized}
    for plan in plans:
        for entry, tensor in zip(plan.plan.entries, plan.tensors, strict=True):
            if entry.action is Action.LOAD and plan.reader is not None:
                given.setdefault(id(tensor), set()).add((str(plan.reader.path), *entry.keys))
            elif entry.action is Action.INIT:
                given.setdefault(id(tensor), {()})
    return given


def _refuse_two_values(
    plan: Plan, tensors: Sequence[Tensor], tapes: Mapping[int, Tape], given: Mapping[int, Collection[tuple[str, ...]]]
) -> None:
    """Raise if tensors are computed from one that a later block loads anew: they would have had its first value."""
    twice = tuple(
        entry if len(given.get(id(tensor), ())) > 1 else entry._replace(action=Action.KEEP)
        for entry, tensor in zip(plan.entries, tensors, strict=True)
    )
    loaded = loaded_storages(Plan(twice), tapes)
    computed = [entry.slot.name for entry in plan.entries if sources_of(entry, tapes, loaded)]
    if computed:
        raise RecordingError(
            f"{', '.join(computed[:5])}{' …' if len(computed) > 5 else ''}: computed from tensors that two blocks give "
            "different values, and this strategy fills in setup. Load each tensor in the block that builds it, or the "
            "later checkpoint after setup."
        )


def _refuse_lost_changes(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> None:
    loads = [entry for entry in entries if entry.action is Action.LOAD]
    written = [entry for entry in loads if written_since(entry, tapes)]
    resized = [entry for entry in loads if entry.spec is not None and entry.spec.shape != entry.slot.shape]
    for what, changed in (("written in part", written), ("of another shape", resized)):
        if changed:
            names = ", ".join(entry.slot.name for entry in changed[:5])
            raise RecordingError(
                f"{names}{' …' if len(changed) > 5 else ''}: {what} since the block that declared the load, and this "
                "strategy loads in setup. Change it once the model has values, or put something else in its place in "
                "a second block: with fabric.init_module(empty_init=True): …"
            )
