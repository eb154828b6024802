"""Models that stay recorded until their strategy shards them in setup, and are filled there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.distributed.agreement import Agreement
from fabric_init.errors import FabricInitError
from fabric_init.filling.allocate import allocate_and_guard, leave_to_later_loads, plan_allocation
from fabric_init.filling.execute import execute_plan, prepare
from fabric_init.filling.merge import planned_tensors, revised
from fabric_init.guard.recorded import fix_of, guard_recorded, loaded_since, overrule_loads, refuse_lost_writes
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, LoadOptions, PlanEntry
from fabric_init.planning.prepare import PreparedPlan, plan_for, prepared_digest
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape import now
from fabric_init.strategies.optimizers import parameters_by_name

_ATTRIBUTE = "_fabric_init_bound"
_PLANS = "_fabric_init_plans"  # on the modules of a bound model: a part that is put into another one keeps its load


class ShardedPlacement(Placement, Protocol):
    """A placement for a model that has been sharded since it was planned for."""

    def current(self, slot: TensorInfo, tensor: Tensor) -> Tensor:
        """Return the tensor that the sharded model holds in the place of ``tensor``."""
        ...


class BoundPlans(NamedTuple):
    """How a recorded model is filled in setup.

    Attributes:
        allocates: Whether tensors of a block without a checkpoint are allocated, and left to a later load.
        own_init: Whether these get the model's own init after all.
    """

    allocates: bool = False
    own_init: bool = False


def bind(model: nn.Module, reader: CheckpointReader | None, wanted: LoadOptions, agreement: Agreement) -> None:
    """Plan for ``model``, if there is a checkpoint, and keep the plan until setup, with those of earlier blocks.

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
    loaded = {name for entry in entries if entry.action is Action.LOAD for name in entry.slot.names}
    overrule_loads(model, loaded, {extra.module for extra in planned.plan.extras})
    _keep(model, bound)  # first: its guard refuses copies, which would find the plans
    for module in model.modules():
        if fix_of(module) is None:
            continue  # nothing to load; an activation function may be one object for all models of a library
        vars(module)[_PLANS] = (*vars(module).get(_PLANS, ()), planned)


def _keep(model: nn.Module, bound: BoundPlans) -> None:
    guard_recorded(model, "fabric.setup(model), with all that its block built, shards and fills it: call that first")
    vars(model)[_ATTRIBUTE] = bound


def is_bound(model: nn.Module) -> bool:
    """Return whether ``model``, or a model in it, is to be sharded and filled in setup."""
    return any(_ATTRIBUTE in vars(module) for module in model.modules())


def choose_own_init(model: nn.Module) -> None:
    """Make setup run the own init of a bound model for tensors that no checkpoint brings."""
    for module in model.modules():
        bound: BoundPlans | None = vars(module).get(_ATTRIBUTE)
        if bound is not None:
            vars(module)[_ATTRIBUTE] = bound._replace(own_init=True)


@contextmanager
def planned_for(model: nn.Module, agreement: Agreement) -> Iterator[PreparedPlan]:
    """Yield the plan for a bound ``model``, which is sharded and filled in the context.

    If planning fails, the model is as it was. If the rest fails, it stays bound, so that it cannot be used.
    """
    bounds = [(module, vars(module).pop(_ATTRIBUTE)) for module in model.modules() if _ATTRIBUTE in vars(module)]
    declared = [(module, vars(module).pop(_PLANS)) for module in model.modules() if _PLANS in vars(module)]
    plans = sorted({id(plan): plan for _, its in declared for plan in its}.values(), key=_declared_at)
    try:
        yield agreement.run_together(
            "planning for the model as it is now", lambda: _plan(model, [b for _, b in bounds], plans), prepared_digest
        )
    except BaseException:
        for module, bound in bounds:
            _keep(module, bound)
        for module, its in declared:
            vars(module)[_PLANS] = its
        raise


def _plan(model: nn.Module, bounds: Sequence[BoundPlans], plans: Sequence[PreparedPlan]) -> PreparedPlan:
    _refuse_sharded(model)
    allocates = any(bound.allocates and not bound.own_init for bound in bounds)
    if plans:
        prepared = revised(plans, model)
        return leave_to_later_loads(prepared, planned_tensors(plans)) if allocates else prepared
    refuse_lost_writes(model)
    earlier = loaded_since(model)
    if earlier is not None:
        return plan_for(model, earlier, LoadOptions(strict=False))
    return plan_allocation(model) if allocates else plan_for(model, None, LoadOptions())


def _without_new_values(prepared: PreparedPlan, placement: ShardedPlacement) -> PreparedPlan:
    """Return the plan, which keeps tensors with values that sharding has put in the places of recorded ones."""

    def revise(entry: PlanEntry, tensor: Tensor) -> PlanEntry:
        if not tensor.is_meta or placement.current(entry.slot, tensor).is_meta:
            return entry
        return PlanEntry(entry.slot._replace(ref=None, real=True), Action.KEEP)

    entries = tuple(map(revise, prepared.plan.entries, prepared.tensors))
    return prepared._replace(plan=replace(prepared.plan, entries=entries))


def _declared_at(prepared: PreparedPlan) -> int:
    """Return a number that orders plans by their blocks: a later load wins."""
    return max((entry.since or 0 for entry in prepared.plan.entries), default=0)


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
    placement_for: Callable[[nn.Module], ShardedPlacement],
    agreement: Agreement,
) -> nn.Module:
    """Shard a bound model, and fill or allocate the tensors that the strategy has put in its parameters' places.

    Args:
        model: A model bound by :func:`bind`.
        shard: Returns the model with the strategy's own tensors, which have no memory yet.
        placement_for: Returns how this rank keeps the tensors of the sharded model.
        agreement: How the ranks keep in step.

    Returns:
        The sharded model.

    Raises:
        CheckpointMismatchError: Keys, shapes or dtypes of checkpoint and model disagree.
        FabricInitError: A rank failed, or ``shard`` made parameters that were not in the plan.
    """
    name = type(model).__name__  # sharding may change it
    with planned_for(model, agreement) as prepared:
        sharded = agreement.run_together("sharding the model", lambda: shard(model))
        placement = placement_for(sharded)
        prepared = _without_new_values(prepared, placement)
        slots = [entry.slot for entry in prepared.plan.entries]
        tensors = [placement.current(slot, tensor) for slot, tensor in zip(slots, prepared.tensors, strict=True)]
        if prepared.plan.allocates:
            agreement.run_together(
                "allocating the model's memory",
                lambda: allocate_and_guard(prepared, sharded, tensors, placement, name=name, agreement=agreement),
            )
        else:
            execute_plan(prepared, sharded, tensors, placement, agreement)
        left = [name for name, tensor in parameters_by_name(sharded).items() if tensor.is_meta]
        if left:
            raise FabricInitError(f"sharding split a tie or made parameters of its own, which have no values: {left}")
        return sharded
