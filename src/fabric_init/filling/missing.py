"""Run the model's own init for allocated tensors, by now moved, cast, or beside others that were loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fabric_init._text import dtype_name
from fabric_init.checkpoints.region import take
from fabric_init.distributed.agreement import SingleProcess
from fabric_init.errors import UninitializedTensorError
from fabric_init.filling.derived import compute_with
from fabric_init.filling.execute import fill
from fabric_init.guard.hooks import items_under, ranks_of, refresh_state, release
from fabric_init.guard.state import ATTRIBUTE, Place, Unfilled, states_under, tensor_at
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.tensors import TensorInfo
from fabric_init.planning.validation import make_plan
from fabric_init.recording.liveness import computed_from, never_written
from fabric_init.recording.replay import view
from fabric_init.recording.tape import TensorRef

Uninitialized = Sequence[tuple[nn.Module, Unfilled]]
"""Uninitialized tensors, with the modules that hold them."""


def initialize_all(uninitialized: Uninitialized) -> None:
    """Run the model's own init for all of these tensors.

    Raises:
        UninitializedTensorError: The model's own code never initializes some tensor, or would compute a wrong value.
    """
    computed = [item.slot.name for _, item in uninitialized if item.slot.ref is None]
    if computed:
        raise UninitializedTensorError(
            f"{', '.join(computed)} came in (by weight_norm, prune, a parametrization, …) when there were no "
            "values to compute with. Do that in the init_module block, or call fabric.init_missing(model) before."
        )
    partly = [item.slot.name for module, item in uninitialized if item.changed(_tensor_of(module, item))]
    if partly:
        raise UninitializedTensorError(
            f"the model's own init would overwrite what was written into a part of {', '.join(partly)}. Call "
            "fabric.init_missing(model) first and write afterwards, or write the whole tensor."
        )
    sources = _sources(uninitialized)
    if lost := dict.fromkeys(item.slot.name for _, item in uninitialized if sources.get(id(item), ()) is None):
        raise UninitializedTensorError(
            f"the model's own init computes {', '.join(lost)} from other tensors, of which this rank has to have "
            "all, with their values. Call init_missing for the whole model; or load it as well, or before setup; "
            "or declare the load: init_module(checkpoint=…)."
        )
    _initialize(uninitialized, sources)


def initialize_possible(uninitialized: Uninitialized) -> None:
    """Run the model's own init for those of these tensors that it can initialize from what this rank holds."""
    with_init = [both for both in uninitialized if both[1].slot.ref is not None]
    sources = _sources(with_init)
    _initialize(
        [
            (module, item)
            for module, item in with_init
            if sources.get(id(item), ()) is not None and not never_written(item.tape, _ref(item))
        ],
        sources,
    )


_Sources = dict[int, list[tuple[TensorRef, Tensor]] | None]


def _sources(uninitialized: Uninitialized) -> _Sources:
    """Return the values that the model's own init computes uninitialized tensors from, by the id of their item.

    ``None`` where this rank does not have them in full. Tensors that need no others are left out.
    """
    still = {_ref(item).storage for _, item in uninitialized}
    sources: _Sources = {}
    with_values: dict[int, dict[int, None]] = {}  # by what the modules share: the same for thousands of tensors
    for module, item in uninitialized:
        built = vars(module)[ATTRIBUTE].built
        places = built.places
        others = with_values.get(id(built))
        if others is None:
            others = with_values[id(built)] = dict.fromkeys(places.keys() - still)
        if item.slot.saved and (storages := computed_from(item.tape, _ref(item).storage, others)):
            tensors = [_full_value(item, places[storage]) for storage in sorted(storages)]
            full = [tensor for tensor in tensors if tensor is not None]
            sources[id(item)] = full if len(full) == len(tensors) else None
    return sources


def _full_value(item: Unfilled, place: Place | None) -> tuple[TensorRef, Tensor] | None:
    if place is None or (module := place[0]()) is None:
        return None
    _, attribute, ref = place
    if (state := vars(module).get(ATTRIBUTE)) is not None:  # elsewhere in the model
        state.refresh()
        if any(other.attribute == attribute for other in state.items):
            return None
    tensor = tensor_at(module, attribute)
    if tensor is None or item.placement.held(tensor) is not tensor or tensor.shape != ref.size:
        return None
    return ref, tensor.detach()


def _initialize(uninitialized: Uninitialized, sources: _Sources) -> None:
    by_tensor = {id(tensor := _tensor_of(module, item)): (item, tensor) for module, item in uninitialized}
    items = [item for item, _ in by_tensor.values()]
    if not items:
        return
    tapes = {_ref(item).storage: item.tape for item in items}
    plan = make_plan([item.slot for item in items], tapes, None, LoadOptions())
    tensors = [tensor for _, tensor in by_tensor.values()]
    placement = _InPlace(items[0].placement)
    record = fill(plan, tensors, tapes, None, placement, exact=False)
    for item, tensor, row in zip(items, tensors, record.rows, strict=True):
        for_it = sources.get(id(item))
        if for_it:
            memory = compute_with(item.slot, item.tape, for_it, tensor.device)
            with torch.no_grad():
                placement.put(item.slot, tensor, take(view(memory, _ref(item)), placement.region(item.slot)))
        item.row.update(status="initialized", origin=row.row.origin, dtype=dtype_name(tensor.dtype))


def _ref(item: Unfilled) -> TensorRef:
    assert item.slot.ref is not None
    return item.slot.ref


def _tensor_of(module: nn.Module, item: Unfilled) -> Tensor:
    tensor = tensor_at(module, item.attribute)
    assert tensor is not None  # otherwise the model does without it, and it is not tracked
    return tensor


class _InPlace:
    """A placement for tensors that may have been moved, cast or laid out anew since they were allocated."""

    def __init__(self, placement: Placement) -> None:
        self.device = placement.device
        self.region = placement.region
        self.held = placement.held

    def put(self, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        self.held(tensor).detach().copy_(value)  # in place: layout, views and ties stay
        return tensor


def initialize_missing(model: nn.Module) -> None:
    """Run the model's own recorded init for every uninitialized tensor under ``model``.

    Raises:
        UninitializedTensorError: The model's own code never initializes some tensor.
    """
    refresh_state(model)
    uninitialized = list(items_under(model))
    (ranks_of(model) or SingleProcess()).run_together(
        "initializing what is missing", lambda: initialize_all(uninitialized)
    )
    for module, state in list(states_under(model)):
        state.refresh("initialized", module)
    release(model)
