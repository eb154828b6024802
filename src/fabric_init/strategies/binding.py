"""A model that stays recorded until its strategy shards it, bound to what it will then be filled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import FabricInitError
from fabric_init.filling.agreement import Agreement
from fabric_init.filling.deferred import guard_recorded, loaded_since, refuse_lost_writes
from fabric_init.filling.materialize import Prepared, carry_out, plan_for, prepare, prepared_digest
from fabric_init.filling.placement import Placement
from fabric_init.filling.plan import Action, Plan, Wanted
from fabric_init.filling.revise import revised
from fabric_init.filling.rooms import Rooms, move_in, plan_rooms, rooms_digest
from fabric_init.filling.slots import Slot
from fabric_init.strategies.optimizers import parameters_by_name

_ATTRIBUTE = "_fabric_init_bound"


class ShardedPlacement(Placement, Protocol):
    """A placement for a model that has been sharded since it was planned for."""

    def current(self, slot: Slot, tensor: Tensor) -> Tensor:
        """What the sharded model holds where it held ``tensor``."""
        ...


class Bound(NamedTuple):
    """What a recorded model gets when it is set up. Without a checkpoint: its own init, or room until a later load."""

    prepared: Prepared | None
    own_init: bool


def bind(model: nn.Module, reader: CheckpointReader | None, wanted: Wanted, agreement: Agreement) -> None:
    """Plan for ``model``, if there is a checkpoint, and remember that until it is sharded.

    Raises:
        CheckpointMismatchError: keys, shapes or dtypes of file and model disagree.
    """
    prepared = prepare(model, reader, wanted, agreement) if reader is not None else None
    _keep(model, Bound(prepared, own_init=False))


def _keep(model: nn.Module, bound: Bound) -> None:
    guard_recorded(model, "fabric.setup(model), with all that its block built, shards and fills it: call that first")
    vars(model)[_ATTRIBUTE] = bound


def is_bound(model: nn.Module) -> bool:
    """Whether ``model`` waits to be sharded and filled."""
    return _ATTRIBUTE in vars(model)


def choose_own_init(model: nn.Module) -> None:
    """Let a bound model without a checkpoint run its own init when it is sharded."""
    bound: Bound = vars(model)[_ATTRIBUTE]
    vars(model)[_ATTRIBUTE] = bound._replace(own_init=True)


@contextmanager
def planned_for(model: nn.Module, agreement: Agreement) -> Iterator[Prepared | Rooms]:
    """Context in which the bound ``model`` is sharded and filled after the plan that it gives.

    If planning fails, the model is as it was. If the rest fails, it stays bound, so that nobody can use it.
    """
    bound: Bound = vars(model).pop(_ATTRIBUTE)
    try:
        yield agreement.same("planning for the model as it is now", lambda: _plan(model, bound), _digest)
    except BaseException:
        _keep(model, bound)
        raise


def _plan(model: nn.Module, bound: Bound) -> Prepared | Rooms:
    if bound.prepared is not None:
        return revised(bound.prepared, model)
    refuse_lost_writes(model)
    earlier = loaded_since(model)
    if earlier is not None:
        return plan_for(model, earlier, Wanted(strict=False))
    return plan_for(model, None, Wanted()) if bound.own_init else plan_rooms(model)


def _without_new_values(planned: Prepared | Rooms, placement: ShardedPlacement) -> Prepared | Rooms:
    """The plan, but for tensors in whose places sharding has put others that have values: those stay."""

    def is_given(slot: Slot, tensor: Tensor) -> bool:
        return tensor.is_meta and not placement.current(slot, tensor).is_meta

    if isinstance(planned, Rooms):
        return planned._replace(later=[both for both in planned.later if not is_given(*both)])
    entries = [
        entry._replace(slot=entry.slot._replace(ref=None, real=True), action=Action.KEEP, keys=(), spec=None)
        if is_given(entry.slot, tensor)
        else entry
        for entry, tensor in zip(planned.plan.entries, planned.tensors, strict=True)
    ]
    return planned._replace(plan=Plan(tuple(entries), planned.plan.unexpected))


def _digest(planned: Prepared | Rooms) -> str:
    return rooms_digest(planned) if isinstance(planned, Rooms) else prepared_digest(planned)


def shard_and_fill(
    model: nn.Module,
    shard: Callable[[nn.Module], nn.Module],
    placement_for: Callable[[nn.Module], ShardedPlacement],
    agreement: Agreement,
) -> nn.Module:
    """Plan for the bound ``model``, let ``shard`` put the strategy's tensors in its parameters' places, fill those.

    Args:
        model: bound by :func:`bind`.
        shard: gives the model with the strategy's own tensors, which have no memory yet.
        placement_for: where this rank keeps the tensors of what ``shard`` gave.
        agreement: how the ranks keep in step.

    Raises:
        CheckpointMismatchError: keys, shapes or dtypes of file and model disagree.
        FabricInitError: a rank failed, or ``shard`` made parameters that were not in the plan.
    """
    with planned_for(model, agreement) as planned:
        sharded = agreement.same("sharding the model", lambda: shard(model), lambda _: "")
        placement = placement_for(sharded)
        planned = _without_new_values(planned, placement)
        if isinstance(planned, Rooms):
            agreement.same(
                "giving the model memory",
                lambda: move_in(sharded, planned, placement, agreement, placement.current),
                lambda _: "",
            )
        else:
            slots = [entry.slot for entry in planned.plan.entries]
            tensors = [placement.current(slot, tensor) for slot, tensor in zip(slots, planned.tensors, strict=True)]
            carry_out(planned, sharded, tensors, placement, agreement)
        left = [name for name, tensor in parameters_by_name(sharded).items() if tensor.is_meta]
        if left:
            raise FabricInitError(f"sharding split a tie or made parameters of its own, which have no values: {left}")
        return sharded
