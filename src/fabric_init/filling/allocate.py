"""Allocate memory for recorded tensors, and guard it until a later load or init has filled it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fabric_init._interrupts import interrupts_held
from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.checkpoints.region import Box
from fabric_init.distributed.agreement import Agreement
from fabric_init.filling.execute import check_ties, fill, make_record
from fabric_init.filling.extra_state import set_extra_states
from fabric_init.filling.missing import initialize_possible
from fabric_init.guard.hooks import hook
from fabric_init.guard.recorded import release_recorded
from fabric_init.guard.sentinels import place_sentinels
from fabric_init.guard.state import ATTRIBUTE, ModelState, ModuleState, Unfilled, own_tensors, version_in
from fabric_init.planning.derived import loaded_storages, sources_of
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import TensorInfo, named_modules, survey
from fabric_init.planning.validation import make_plan
from fabric_init.recording.liveness import never_written
from fabric_init.recording.replay import real_execution
from fabric_init.recording.tape import Tape
from fabric_init.reports.registry import RowRecord, keep_record


def plan_allocation(model: nn.Module) -> PreparedPlan:
    """Return the plan for a recorded ``model`` that a later load is to fill.

    Tensors that no checkpoint brings, such as non-persistent buffers, get the model's own init at once.

    Raises:
        UninitializedTensorError: The model's own code never gives one of those a value.
    """
    slots, tensors, tapes = survey(model)
    pairs = list(zip(slots, tensors, strict=True))
    later = [(slot, tensor) for slot, tensor in pairs if _is_left_to_a_load(slot, tapes)]
    now = [(slot, tensor) for slot, tensor in pairs if not _is_left_to_a_load(slot, tapes)]
    plan = make_plan([slot for slot, _ in now], tapes, None, LoadOptions())
    entries = (*(PlanEntry(slot, Action.ALLOCATE) for slot, _ in later), *plan.entries)
    tensors = [tensor for _, tensor in (*later, *now)]
    return PreparedPlan(replace(plan, entries=entries), tensors, tapes, None, exact=False)


def leave_to_later_loads(prepared: PreparedPlan, planned: Collection[int]) -> PreparedPlan:
    """Return ``prepared`` with memory only for recorded tensors that are not among the ``planned`` ones (by id).

    Tensors that the constructor computes from loaded ones are initialized nevertheless: all that they need is there.
    """
    plan, tensors, tapes, _, exact = prepared
    loaded = {storage: source.since for storage, source in loaded_storages(plan, tapes).items()}

    def revise(entry: PlanEntry, tensor: Tensor) -> PlanEntry:
        if entry.action is not Action.INIT or id(tensor) in planned or not _is_left_to_a_load(entry.slot, tapes):
            return entry
        if sources_of(entry, tapes, loaded, exact=exact):
            return entry
        return entry._replace(action=Action.ALLOCATE)

    revised = replace(plan, entries=tuple(map(revise, plan.entries, tensors)))
    return prepared._replace(plan=revised, exact=False) if revised.allocates else prepared


def allocate(models: Sequence[nn.Module], placement_for: Callable[[nn.Module], Placement]) -> None:
    """Allocate full tensors for recorded models, which may share some of them."""
    placed: dict[int, Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for model, prepared in [(model, plan_allocation(model)) for model in models]:
        allocate_and_guard(
            prepared,
            model,
            prepared.tensors,
            placement_for(model),
            name=type(model).__name__,
            placed=placed,
            storages=storages,
        )


def allocate_and_guard(
    prepared: PreparedPlan,
    model: nn.Module,
    tensors: Sequence[Tensor],
    placement: Placement,
    *,
    name: str,
    agreement: Agreement | None = None,
    placed: dict[int, Tensor] | None = None,
    storages: dict[int, torch.UntypedStorage] | None = None,
) -> None:
    """Execute a plan that allocates some tensors, and guard those.

    Args:
        prepared: The plan.
        model: The model that was planned for, or what a strategy has made of it.
        tensors: The tensors that the model holds now, in the plan's order.
        placement: How this rank keeps the tensors.
        name: The class of the model that the user built, for messages.
        agreement: Of ranks that only together hold the model.
        placed: The tensors of other models that have been placed, by identity.
        storages: The storages of other models that have been allocated, by number.
    """
    placed, storages = placed if placed is not None else {}, storages if storages is not None else {}
    plan, _, tapes, reader, exact = prepared
    pairs = list(zip(plan.entries, tensors, strict=True))
    later = [(entry, tensor) for entry, tensor in pairs if entry.action is Action.ALLOCATE]
    now = [(entry, tensor) for entry, tensor in pairs if entry.action is not Action.ALLOCATE]
    values: dict[int, Tensor] = {}
    with real_execution():
        for entry, tensor in later:
            if id(tensor) not in placed:
                values[id(tensor)] = _allocate(entry.slot, tapes, storages, placement)
    to_fill = replace(plan, entries=tuple(entry for entry, _ in now))
    check_ties(to_fill, reader, placement)
    record = fill(to_fill, [tensor for _, tensor in now], tapes, reader, placement, exact=exact)
    rows = make_record(replace(plan, entries=tuple(entry for entry, _ in later)), tapes, None).rows
    with interrupts_held():  # no tensor has uninitialized memory before all of them are guarded
        for entry, tensor in later:
            if id(tensor) not in placed:
                with torch.inference_mode(tensor.is_inference()), torch.no_grad(), DisableTorchFunction():
                    placed[id(tensor)] = placement.put(entry.slot, tensor, values.pop(id(tensor)))
        release_recorded(model)
        state = ModelState(name, initialize_possible, agreement)
        items = [(entry.slot, placed[id(tensor)], row) for (entry, tensor), row in zip(later, rows, strict=True)]
        _guard(model, state, items, tapes, placement)
    record.rows += rows
    keep_record(model, record)
    set_extra_states(plan.extras)


def _is_left_to_a_load(slot: TensorInfo, tapes: Mapping[int, Tape]) -> bool:
    """Return whether a later load can fill a tensor, and the guard can tell whether it has."""
    if not slot.saved or slot.ref is None:
        return False
    # bools have no sentinel value, so they get the model's own init at once, where it has one
    return slot.dtype != torch.bool or never_written(tapes[slot.ref.storage], slot.ref)


def _guard(
    model: nn.Module,
    state: ModelState,
    items: Sequence[tuple[TensorInfo, Tensor, RowRecord]],
    tapes: Mapping[int, Tape],
    placement: Placement,
) -> None:
    owners = dict(named_modules(model))
    sharded: set[str] = set()  # modules that no rank holds alone; the others may run on one rank only
    for slot, tensor, row in items:
        assert slot.ref is not None
        version = version_in(placement, tensor)
        for name in slot.names:  # under each: a tie may be used through any of its modules
            prefix, _, attribute = name.rpartition(".")
            owner = owners[prefix]
            own = vars(owner).get(ATTRIBUTE)
            if own is None:
                own = vars(owner)[ATTRIBUTE] = ModuleState(owner, state, own_tensors(owner))
            if all(item.attribute != attribute for item in own.items):
                item = Unfilled(attribute, slot, tapes[slot.ref.storage], placement, row, tensor, version)
                own.items.append(item)
                if item.is_part:
                    sharded.update(_with_parents(prefix))
                own.built.enter(owner, item)
    if items:
        for prefix, module in owners.items():  # all: a parent may use its child's weight without calling the child
            hook(module, state, state.agreement if prefix in sharded else None)


def _with_parents(name: str) -> Iterator[str]:
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def _allocate(
    slot: TensorInfo, tapes: Mapping[int, Tape], storages: dict[int, torch.UntypedStorage], placement: Placement
) -> Tensor:
    """Allocate this rank's part of a tensor, with sentinel values in it.

    Full tensors share a storage where their recorded storages do.
    """
    ref, region, device = slot.ref, placement.region(slot), placement.device(slot)
    assert ref is not None
    if region is not None:
        sizes = region.sizes if isinstance(region, Box) else (region.numel,)
        tensor = torch.empty(sizes, dtype=ref.dtype, device=device)
    else:
        storage = storages.get(ref.storage)
        if storage is None:
            nbytes = tapes[ref.storage].storages[ref.storage].nbytes
            storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
            storages[ref.storage] = storage
        tensor = torch.empty(0, dtype=ref.dtype, device=device).set_(storage, ref.offset, ref.size, ref.stride)
    place_sentinels(tensor)
    return tensor
