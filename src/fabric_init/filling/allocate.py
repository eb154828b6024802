"""Memory without values for a recorded model, under guard until they have come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fabric_init._interrupts import interrupts_held
from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.region import Box
from fabric_init.distributed.agreement import Agreement
from fabric_init.filling.execute import check_ties, fill, make_record
from fabric_init.filling.loader import set_extra_states
from fabric_init.filling.missing import initialize_possible
from fabric_init.guard.hooks import hook
from fabric_init.guard.recorded import release_recorded
from fabric_init.guard.sentinels import place_mark
from fabric_init.guard.state import ATTRIBUTE, ModelState, ModuleState, Unfilled, own_tensors, version_in
from fabric_init.planning.derived import loaded_storages, sources_of
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, LoadOptions, Plan, PlanEntry
from fabric_init.planning.prepare import PreparedPlan, plan_digest
from fabric_init.planning.tensors import TensorInfo, named_modules, survey
from fabric_init.planning.validation import make_plan
from fabric_init.recording.liveness import never_written
from fabric_init.recording.replay import real_execution
from fabric_init.recording.tape import Tape
from fabric_init.reports.registry import RowRecord, keep_record


class Rooms(NamedTuple):
    """Which tensors of a model get room only, and which the model's own init at once: what no checkpoint brings."""

    later: list[tuple[TensorInfo, Tensor]]
    now: list[tuple[TensorInfo, Tensor]]
    plan: Plan  # for ``now``
    tapes: Mapping[int, Tape]
    name: str  # of the class that the user built
    reader: CheckpointReader | None = None  # for ``now``


def plan_rooms(model: nn.Module) -> Rooms:
    """Look the recorded ``model`` over. Raises for a non-persistent tensor that its code never gives a value."""
    slots, tensors, tapes = survey(model)
    both = list(zip(slots, tensors, strict=True))
    later = [(slot, tensor) for slot, tensor in both if _waits(slot, tapes)]
    now = [(slot, tensor) for slot, tensor in both if not _waits(slot, tapes)]
    plan = make_plan([slot for slot, _ in now], tapes, None, LoadOptions())
    return Rooms(later, now, plan, tapes, type(model).__name__)


def with_rooms(prepared: PreparedPlan, model: nn.Module, planned: Collection[int]) -> PreparedPlan | Rooms:
    """``prepared``, in which what is recorded and not among the ``planned`` tensors (by id) waits for a later load.

    What is computed from loaded tensors does not: it has all that it takes.
    """
    plan, tensors, tapes, reader, exact = prepared
    loaded = {storage: source.since for storage, source in loaded_storages(plan, tapes).items()}
    later: list[tuple[TensorInfo, Tensor]] = []
    now: list[tuple[PlanEntry, Tensor]] = []
    for entry, tensor in zip(plan.entries, tensors, strict=True):
        waits = entry.action is Action.INIT and id(tensor) not in planned and _waits(entry.slot, tapes)
        if waits and not sources_of(entry, tapes, loaded, exact=exact):
            later.append((entry.slot, tensor))
        else:
            now.append((entry, tensor))
    if not later:
        return prepared
    entries = tuple(entry for entry, _ in now)
    both = [(entry.slot, tensor) for entry, tensor in now]
    return Rooms(later, both, replace(plan, entries=entries), tapes, type(model).__name__, reader)


def allocate(models: Sequence[nn.Module], placement_for: Callable[[nn.Module], Placement]) -> None:
    """Give recorded models memory without values, whole. They may share tensors."""
    shared: dict[int, Tensor] = {}
    memory: dict[int, torch.UntypedStorage] = {}
    for model, rooms in [(model, plan_rooms(model)) for model in models]:
        move_in(model, rooms, placement_for(model), shared=shared, memory=memory)


def move_in(
    model: nn.Module,
    rooms: Rooms,
    placement: Placement,
    agreement: Agreement | None = None,
    current: Callable[[TensorInfo, Tensor], Tensor] = lambda _, tensor: tensor,
    shared: dict[int, Tensor] | None = None,
    memory: dict[int, torch.UntypedStorage] | None = None,
) -> None:
    """Carry ``rooms`` out.

    Args:
        model: what was planned for, or what a strategy has made of it.
        rooms: from :func:`plan_rooms`.
        placement: how this rank keeps the tensors.
        agreement: of ranks that only together hold the model.
        current: what the model holds today where it held a tensor when it was planned for.
        shared: tensors of other models that have been placed, by identity.
        memory: storages of other models that have been given memory.
    """
    shared, memory = shared if shared is not None else {}, memory if memory is not None else {}
    later = [(slot, current(slot, tensor)) for slot, tensor in rooms.later]
    now = [current(slot, tensor) for slot, tensor in rooms.now]
    values = {}
    with real_execution():
        for slot, tensor in later:
            if id(tensor) not in shared:
                values[id(tensor)] = _room(slot, rooms.tapes, memory, placement)
    check_ties(rooms.plan, rooms.reader, placement)
    record = fill(rooms.plan, now, rooms.tapes, rooms.reader, placement, exact=False)
    rows = make_record(_plan_of(rooms.later), rooms.tapes, None).rows
    with interrupts_held():  # nothing has memory without values before all of it is under guard
        for slot, tensor in later:
            if id(tensor) not in shared:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad(), DisableTorchFunction():
                    shared[id(tensor)] = placement.put(slot, tensor, values.pop(id(tensor)))
        release_recorded(model)
        unfilled = [(slot, shared[id(tensor)]) for slot, tensor in later]
        _guard(model, rooms, unfilled, rows, placement, agreement)
    record.rows += rows
    keep_record(model, record)
    set_extra_states(rooms.plan.extras)


def _plan_of(later: Sequence[tuple[TensorInfo, Tensor]]) -> Plan:
    return Plan(tuple(PlanEntry(slot, Action.INIT) for slot, _ in later))


def rooms_digest(rooms: Rooms) -> str:
    """What tells the rooms of one model from those of another."""
    return plan_digest(Plan((*_plan_of(rooms.later).entries, *rooms.plan.entries)))


def _waits(slot: TensorInfo, tapes: Mapping[int, Tape]) -> bool:
    if not slot.saved or slot.ref is None:
        return False
    # no mark can be put into bools: they get the model's own init at once, where it has one
    return slot.dtype != torch.bool or never_written(tapes[slot.ref.storage], slot.ref)


def _guard(
    model: nn.Module,
    rooms: Rooms,
    unfilled: Sequence[tuple[TensorInfo, Tensor]],
    rows: Sequence[RowRecord],
    placement: Placement,
    agreement: Agreement | None,
) -> None:
    owners = dict(named_modules(model))
    built = ModelState(rooms.name, initialize_possible, agreement)
    sharded: set[str] = set()  # modules that no rank holds alone; the others may run on one rank only
    for (slot, tensor), row in zip(unfilled, rows, strict=True):
        row.update(status="unfilled", origin="")
        assert slot.ref is not None
        version = version_in(placement, tensor)
        for name in slot.names:  # under each: a tie may be used through any of its modules
            prefix, _, attribute = name.rpartition(".")
            owner = owners[prefix]
            waiting = vars(owner).get(ATTRIBUTE)
            if waiting is None:
                waiting = vars(owner)[ATTRIBUTE] = ModuleState(owner, built, own_tensors(owner))
            if all(item.attribute != attribute for item in waiting.items):
                item = Unfilled(attribute, slot, rooms.tapes[slot.ref.storage], placement, row, tensor, version)
                waiting.items.append(item)
                if item.is_part:
                    sharded.update(_with_all_around(prefix))
                waiting.built.enter(owner, item)
    if unfilled:
        for prefix, module in owners.items():  # all: a parent may use its child's weight without calling the child
            hook(module, built, agreement if prefix in sharded else None)


def _with_all_around(name: str) -> Iterator[str]:
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _room(
    slot: TensorInfo, tapes: Mapping[int, Tape], memory: dict[int, torch.UntypedStorage], placement: Placement
) -> Tensor:
    """Memory for what this rank keeps of one tensor, with the marks of the unfilled in it.

    Whole tensors share it where their recorded storages do.
    """
    ref, region, device = slot.ref, placement.region(slot), placement.device(slot)
    assert ref is not None
    if region is not None:
        sizes = region.sizes if isinstance(region, Box) else (region.numel,)
        tensor = torch.empty(sizes, dtype=ref.dtype, device=device)
    else:
        storage = memory.get(ref.storage)
        if storage is None:
            room = torch.empty(tapes[ref.storage].storages[ref.storage].nbytes, dtype=torch.uint8, device=device)
            storage = memory[ref.storage] = room.untyped_storage()
        tensor = torch.empty(0, dtype=ref.dtype, device=device).set_(storage, ref.offset, ref.size, ref.stride)
    place_mark(tensor)
    return tensor
