"""A model that stays recorded until its strategy shards it, bound to what it will then be filled from.

[Note: why parameters keep their identity]
Plans know tensors by identity, and users make optimizers, ties and lists of parameters before ``setup``. So a tensor
stays the same Python object while it is recorded, planned for, and filled, and only a strategy that makes parameters of
its own (``fully_shard``, ``distribute_tensor``) puts others in its place, which are computed on the tape from it: see
[Note: sharding recorded tensors].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.distributed.agreement import Agreement
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.filling.execute import execute_plan, prepare
from fabric_init.filling.init_missing import initialize_possible, recompute_from_loaded, run_replaced_init
from fabric_init.filling.merge import declared_at, merged, planned_tensors
from fabric_init.filling.packed.plan import pack_and_plan_held, plan_held
from fabric_init.filling.wait_for_load import let_wait
from fabric_init.guard.before_forward import guard_forward, mark_broken
from fabric_init.guard.guard_model import guard_model
from fabric_init.guard.loads import unwatch_loads, watch_loads
from fabric_init.guard.waiting_tensors import draw_for_own_init, has_own_init, own_init_is_wanted, own_tensors, unfilled
from fabric_init.planning.derived import loaded_storages, sources_of
from fabric_init.planning.digest import sharded_lines
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.prepare import PreparedPlan
from fabric_init.planning.tensors import parameters_by_name
from fabric_init.recording.after_block.waiting_storages import THREE_WAYS
from fabric_init.recording.tape.liveness import computed_from
from fabric_init.recording.tape.tape import now
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, recorded
from fabric_init.sharding.dtensor import ShardedTensors, local
from fabric_init.sharding.whole import shards_of

_ATTRIBUTE = "_fabric_init_bound"
_PLANS = "_fabric_init_plans"  # on the modules of a bound model: a part that is put into another one keeps its load
FIX = "fabric.setup(model), with all that its block built, shards and fills it: call that first."


class BoundPlans(NamedTuple):
    """How a recorded model is filled in setup.

    What it got in a block without checkpoint gets its own init, or waits on for a later load.
    """

    allocates: bool = False
    own_init: bool = False
    initialized: frozenset[int] = frozenset()
    """Ids of the tensors that had no declared load when the model's own init was asked for."""


def bind(model: nn.Module, reader: CheckpointReader | None, wanted: LoadOptions, agreement: Agreement) -> None:
    """Plan for ``model``, if there is a checkpoint, and remember that until it is sharded.

    Raises:
        CheckpointMismatchError: Keys, shapes or dtypes of checkpoint and model disagree.
    """
    bound: BoundPlans = vars(model).get(_ATTRIBUTE, BoundPlans())
    if reader is None:
        _keep(model, bound._replace(allocates=True))
        return
    prepared, since = prepare(model, reader, wanted, agreement), now()
    entries = tuple(entry._replace(since=since) for entry in prepared.plan.entries)
    planned = prepared._replace(plan=replace(prepared.plan, entries=entries))
    _keep(model, bound)
    for module in model.modules():
        if any(recorded(tensor) is not None for _, tensor in own_tensors(module)) or module is model:
            vars(module)[_PLANS] = (*vars(module).get(_PLANS, ()), planned)


def _keep(model: nn.Module, bound: BoundPlans) -> None:
    guard_model(model, FIX, gives_memory=False)
    watch_loads(model, _complete)
    vars(model)[_ATTRIBUTE] = bound


def _complete(model: nn.Module) -> None:
    """After a load before setup, let tensors that it did not bring have their own init, but for declared loads."""
    planned = planned_tensors([plan for module in model.modules() for plan in vars(module).get(_PLANS, ())])
    left = [t for _, t in unfilled(model) if id(t) not in planned and has_own_init(t)]
    recompute_from_loaded(model, left)
    own_init_is_wanted(left)


def is_bound(model: nn.Module) -> bool:
    """Return whether ``model``, or a model in it, waits to be sharded and filled."""
    return any(_ATTRIBUTE in vars(module) for module in model.modules())


def left_to_loads(model: nn.Module) -> dict[str, set[str]]:
    """Return the names of the tensors that a load is to bring which has not been declared.

    Each with the names of those from which the constructor has computed it.
    """
    bounds = [bound for module in model.modules() if (bound := vars(module).get(_ATTRIBUTE)) is not None]
    if bounds and not any(bound.allocates and not bound.own_init for bound in bounds):
        return {}
    planned = planned_tensors([plan for module in model.modules() for plan in vars(module).get(_PLANS, ())])
    left = [(name, recorded(t)) for name, t in unfilled(model) if id(t) not in planned]
    names = {found.storage: name for name, found in left if found is not None}
    return {
        name: {names[s] for s in computed_from(found.tape, found.storage, names, copies=False) if s != found.storage}
        for name, found in left
        if found is not None
    }


def choose_own_init(model: nn.Module) -> None:
    """Make setup run the own init of a bound model for tensors that no checkpoint brings."""
    draw_for_own_init(model)
    planned = planned_tensors([plan for module in model.modules() for plan in vars(module).get(_PLANS, ())])
    initialized = frozenset(id(tensor) for _, tensor in unfilled(model) if id(tensor) not in planned)
    for module in model.modules():
        bound: BoundPlans | None = vars(module).get(_ATTRIBUTE)
        if bound is not None:
            vars(module)[_ATTRIBUTE] = bound._replace(own_init=True, initialized=bound.initialized | initialized)


@contextmanager
def planned_for(model: nn.Module, agreement: Agreement) -> Iterator[PreparedPlan]:
    """Context in which the bound ``model`` is sharded and filled after the plan that it yields.

    If planning fails, the model is as it was. If the rest fails, it stays bound, so that it cannot be used.
    """
    bounds = [(module, vars(module).pop(_ATTRIBUTE)) for module in model.modules() if _ATTRIBUTE in vars(module)]
    declared = [(module, vars(module).pop(_PLANS)) for module in model.modules() if _PLANS in vars(module)]
    plans = sorted({id(plan): plan for _, its in declared for plan in its}.values(), key=declared_at)
    prepared: PreparedPlan | None = None
    try:
        prepared = agreement.run_together(
            "planning for the model as it is now", lambda: _plan(model, [b for _, b in bounds], plans), sharded_lines
        )
        for tape in prepared.tapes.values():
            tape.current().after_block.gives_memory = True
        yield prepared
    except BaseException:
        if prepared is not None:
            mark_broken(model)
        for module, bound in bounds:
            vars(module)[_ATTRIBUTE] = bound
        for module, its in declared:
            vars(module)[_PLANS] = its
        raise


def _plan(model: nn.Module, bounds: Sequence[BoundPlans], plans: Sequence[PreparedPlan]) -> PreparedPlan:
    _refuse_sharded(model)
    if any(bound.allocates for bound in bounds):
        run_replaced_init(model, planned_tensors(plans))
    prepared = merged(plans, model, frozenset().union(*(bound.initialized for bound in bounds)))
    if not any(bound.allocates and not bound.own_init for bound in bounds):
        return pack_and_plan_held(prepared, model, WholeTensors())
    prepared, planned = plan_held(prepared, model), planned_tensors(plans)
    loaded = loaded_storages(prepared.plan, prepared.tapes)

    def chosen(entry: PlanEntry, tensor: Tensor) -> bool:
        return id(tensor) not in planned and not sources_of(entry, prepared.tapes, loaded, exact=prepared.exact)

    plan = let_wait(prepared.plan, prepared.tensors, prepared.tapes, chosen)
    _refuse_partly_written(plan.entries, prepared)
    return prepared._replace(plan=plan)


def _refuse_partly_written(entries: Sequence[PlanEntry], prepared: PreparedPlan) -> None:
    lost = [
        entry.slot.name
        for entry in entries
        if entry.action is Action.WAIT and (ref := entry.slot.ref) is not None
        if (tape := prepared.tapes[ref.storage]).written_since(ref.storage, tape.waits.get(ref.storage, 0))
    ]
    if lost:
        raise RecordingError(
            f"{', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}: written in part before setup, and the "
            "rest waits for a load. Write the whole tensor, call fabric.init_missing(model) before setup, or write "
            "after it."
        )


def _refuse_sharded(model: nn.Module) -> None:
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor) or hasattr(p, "ds_id")]
    if sharded:
        raise FabricInitError(
            f"{sharded[0]} was sharded by an earlier setup, and is in this model, too ({len(sharded)} such parameters)."
            " Set models that share modules up as one: fabric.setup(nn.ModuleList([one, other])) shards them once."
        )


def shard_and_fill(
    model: nn.Module,
    shard: Callable[[nn.Module], nn.Module],
    placement_for: Callable[[nn.Module], Placement],
    agreement: Agreement,
) -> nn.Module:
    """Shard a bound model, and fill what this rank keeps of it, or let that wait for a load.

    Args:
        model: bound by :func:`bind`.
        shard: returns the model with the strategy's own tensors, which have no memory yet.
        placement_for: where this rank keeps the tensors of what ``shard`` returned, but for DTensors.
        agreement: how the ranks keep in step.

    Raises:
        CheckpointMismatchError: Keys, shapes or dtypes of checkpoint and model disagree.
        FabricInitError: A rank failed, or ``shard`` made parameters that were not in the plan.
    """
    with planned_for(model, agreement) as planned:
        sharded = agreement.run_together("sharding the model", lambda: shard(model))
        planned, dtensors = _as_sharded(planned, sharded)
        placement = ShardedTensors(dtensors, placement_for(sharded))
        unwatch_loads(model)
        execute_plan(planned, sharded, planned.tensors, placement, agreement)
        if planned.plan.waits:
            for tape in {tape.current() for tape in planned.tapes.values()}:
                tape.after_block.waiting.fix = THREE_WAYS
            watch_loads(sharded, initialize_possible)
            guard_forward(sharded, agreement)
        _refuse_left(planned, sharded)
        return sharded


def _as_sharded(planned: PreparedPlan, sharded: nn.Module) -> tuple[PreparedPlan, dict[str, DTensor]]:
    """Return the plan for what ``sharded`` holds in the places of the tensors of ``planned``, and its DTensors by name.

    What is in the model no longer, because ``shard`` has put something with values in its place, is left out.
    """
    found = shards_of(sharded)
    ours = {id(tensor) for tensor in (*sharded.parameters(), *sharded.buffers())}
    entries, tensors, dtensors = [], [], {}
    for entry, tensor in zip(planned.plan.entries, planned.tensors, strict=True):
        dtensor = None if entry.slot.ref is None else found.get(entry.slot.ref)
        if dtensor is not None:
            vars(dtensor).update(vars(tensor))
            dtensors[entry.slot.name] = dtensor
        elif entry.slot.kind != "attribute" and isinstance(tensor, RecordedTensor) and id(tensor) not in ours:
            continue
        entries.append(entry)
        tensors.append(tensor if dtensor is None else dtensor)
    return planned._replace(plan=replace(planned.plan, entries=tuple(entries)), tensors=tensors), dtensors


def _refuse_left(planned: PreparedPlan, sharded: nn.Module) -> None:
    """Raise if tensors of the sharded model have no values, and do not wait for a load."""
    both = zip(planned.plan.entries, planned.tensors, strict=True)
    waiting = {id(tensor) for entry, tensor in both if entry.action is Action.WAIT}
    left = [name for name, tensor in unfilled(sharded) if id(tensor) not in waiting]
    left += [name for name, parameter in parameters_by_name(sharded).items() if local(parameter).is_meta]
    if left:
        raise FabricInitError(f"sharding split a tie or made parameters of its own, which have no values: {left}")
