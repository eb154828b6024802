"""A model without checkpoint on a strategy that keeps tensors whole: what a load can bring waits for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from fabric_init.distributed.agreement import Agreement
from fabric_init.filling.execute import execute_plan
from fabric_init.filling.init_missing import initialize_possible
from fabric_init.guard.guard_model import guard_model
from fabric_init.guard.loads import watch_loads
from fabric_init.guard.waiting_tensors import waits
from fabric_init.planning.digest import plan_lines
from fabric_init.planning.make_plan import make_plan
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, LoadOptions, Plan, PlanEntry, storage_groups
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import tensors_and_tapes
from fabric_init.recording.tape.tape import Tape
from fabric_init.sharding.packed_weights import as_plain_model, wraps


def wait_for_load(
    models: Sequence[nn.Module], placement_for: Callable[[nn.Module], Placement], agreement: Agreement
) -> None:
    """Let what ``state_dict`` holds of recorded models wait, and give the rest the model's own init."""
    prepared = [
        agreement.run_together("planning the initialization", partial(_plan, model), plan_lines) for model in models
    ]
    for model, plan in zip(models, prepared, strict=True):
        placement = placement_for(model)
        guard_model(model, placement=placement)
        watch_loads(model, initialize_possible)
        execute_plan(plan, model, plan.tensors, placement, agreement)


def _plan(model: nn.Module) -> PreparedPlan:
    with as_plain_model(model, wraps) as shown:
        infos, tensors, tapes = tensors_and_tapes(shown.walk)
    saved = [info.saved and info.ref is not None for info in infos]
    now = make_plan([info for info, later in zip(infos, saved, strict=True) if not later], tapes, None, LoadOptions())
    # Until somebody uses them, so that to_empty() keeps what no load will bring.
    entries = iter(entry._replace(on_use=entry.slot.ref is not None) for entry in now.entries)
    all_of_them = [
        PlanEntry(info, Action.WAIT) if later else next(entries) for info, later in zip(infos, saved, strict=True)
    ]
    return PreparedPlan(with_waiting_storages(replace(now, entries=tuple(all_of_them))), tensors, tapes, None, False)


def with_waiting_storages(plan: Plan) -> Plan:
    """Return ``plan`` in which a tensor that shares memory with one that waits, waits as well."""
    entries = list(plan.entries)
    for positions in storage_groups(entries).values():
        if any(entries[position].action is Action.WAIT for position in positions):
            for position in positions:
                entries[position] = entries[position]._replace(action=Action.WAIT)
    return replace(plan, entries=tuple(entries))


def let_wait(
    plan: Plan, tensors: Sequence[Tensor], tapes: Mapping[int, Tape], chosen: Callable[[PlanEntry, Tensor], bool]
) -> Plan:
    """Return ``plan`` in which recorded tensors that are ``chosen``, and have no values yet, wait for a later load.

    Recorded tensors that no load can bring are made when they are used.
    """
    entries = [
        entry._replace(action=Action.WAIT)
        if entry.action is Action.INIT
        and entry.slot.saved
        and entry.slot.ref
        and chosen(entry, tensor)
        and waits(tensor)
        else entry._replace(on_use=entry.action is Action.INIT and not entry.slot.saved and entry.slot.ref is not None)
        for entry, tensor in zip(plan.entries, tensors, strict=True)
    ]
    return with_waiting_storages(replace(plan, entries=tuple(entries)))
