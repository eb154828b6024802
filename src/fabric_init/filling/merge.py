"""Merge the plans of several recorded blocks, and update them to what the user has changed in the model since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.mapping.combined import CombinedReader
from fabric_init.errors import RecordingError
from fabric_init.guard.recorded import loaded_since, refuse_lost_writes, replaced_since_block, wants_extra_state
from fabric_init.planning.derived import replaced_since, written_since
from fabric_init.planning.matching import own_init
from fabric_init.planning.plan import Action, DerivedFrom, Plan, PlanEntry
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import survey
from fabric_init.planning.validation import check_all_have_values
from fabric_init.recording.liveness import covers
from fabric_init.recording.tape import Tape


def revised(plans: Sequence[PreparedPlan], model: nn.Module) -> PreparedPlan:
    """Return one plan for ``model`` as it is now: as if each block had filled it, and the user had changed it then.

    Tensors are known by identity, so modules may have been moved, wrapped or renamed, and models of several blocks put
    together. Tensors that the user has loaded, written or put into the model since are kept; a recorded tensor of
    another block gets its own init.

    Args:
        plans: The plans in the order of their blocks; a later load wins.
        model: The model with the planned tensors.

    Raises:
        RecordingError: Recorded tensors were written in place, without memory, or in a later block than their load.
        UninitializedTensorError: A tensor that came since has neither values nor a recorded init.
    """
    refuse_lost_writes(model)
    slots, tensors, tapes = survey(model)
    replaced, earlier = replaced_since_block(model), loaded_since(model)
    readers: list[CheckpointReader] = [plan.reader for plan in plans if plan.reader is not None]
    readers += [earlier] if earlier is not None else []
    several = CombinedReader(readers)
    reader = several if len(several) > 1 else readers[0]  # which may have a way of its own to load all
    planned = _by_tensor(plans, several)
    loaded = frozenset(earlier.keys()) if earlier is not None else frozenset()
    entries = []
    for slot, tensor in zip(slots, tensors, strict=True):
        over = next((name for name in slot.names if name in loaded), None)
        if over is not None and earlier is not None:
            entries.append(PlanEntry(slot, Action.LOAD, (several.key(earlier, over),), earlier.spec(over)))
        elif slot.real and any(name in replaced for name in slot.names):
            entries.append(PlanEntry(slot, Action.KEEP))
        elif (entry := planned.get(id(tensor))) is not None and not replaced_since(entry, slot, tapes):
            entries.append(entry._replace(slot=slot))
        else:
            entries.append(PlanEntry(slot, own_init(slot, tapes)))
    check_all_have_values(entries, tapes, reader)
    _refuse_lost_changes(entries, tapes)
    unexpected = tuple(key for plan in plans for key in plan.plan.unexpected)
    held = set(model.modules())
    extras = tuple(
        extra
        for plan in plans
        for extra in plan.plan.extras
        if extra.module in held and wants_extra_state(extra.module)
    )
    plan = Plan(tuple(entries), unexpected, extras, _sources(planned.values(), plans))
    return PreparedPlan(plan, tensors, tapes, reader, any(plan.exact for plan in plans))


def planned_tensors(plans: Sequence[PreparedPlan]) -> set[int]:
    """Return the ids of the tensors in the plans."""
    return {id(tensor) for plan in plans for tensor in plan.tensors}


def _by_tensor(plans: Sequence[PreparedPlan], reader: CombinedReader) -> dict[int, PlanEntry]:
    entries: dict[int, PlanEntry] = {}
    for plan in plans:
        for entry, tensor in zip(plan.plan.entries, plan.tensors, strict=True):
            if entry.action is Action.LOAD:
                assert plan.reader is not None
                entries[id(tensor)] = entry._replace(keys=tuple(reader.key(plan.reader, key) for key in entry.keys))
            else:
                entries.setdefault(id(tensor), entry)
    return entries


def _sources(entries: Iterable[PlanEntry], plans: Sequence[PreparedPlan]) -> dict[int, DerivedFrom]:
    """Return the loads of the plans by storage, including those of tensors that the model no longer holds."""
    tapes = {storage: tape for plan in plans for storage, tape in plan.tapes.items()}
    return {
        ref.storage: DerivedFrom(ref, entry.keys[0], entry.since)
        for entry in entries
        if entry.action is Action.LOAD and (ref := entry.slot.ref) is not None
        if covers(tapes[ref.storage].current(), ref)
    }


def _refuse_lost_changes(entries: Sequence[PlanEntry], tapes: Mapping[int, Tape]) -> None:
    loads = [entry for entry in entries if entry.action is Action.LOAD]
    written = [entry for entry in loads if written_since(entry, tapes)]
    resized = [entry for entry in loads if entry.spec is not None and entry.spec.shape != entry.slot.shape]
    for what, changed in (("written", written), ("of another shape", resized)):
        if changed:
            names = ", ".join(entry.slot.name for entry in changed[:5])
            raise RecordingError(
                f"{names}{' …' if len(changed) > 5 else ''}: {what} since the block that declared the load, and this "
                "strategy loads in setup. Change it once the model has values, or put something else in its place in "
                "a second block: with fabric.init_module(empty_init=True): …"
            )
