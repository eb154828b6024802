"""A tensor that has memory but no values cannot be used or saved.

Each module keeps the list of its own tensors that wait for values, and every read that matters passes a hook:
``forward`` and ``state_dict`` raise while anything under the module waits, ``load_state_dict`` takes note of what has
come. What waits hangs on the modules themselves, so parts can be taken out, replaced, copied and put into other models.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init.errors import UninitializedTensorError
from fabric_init.filling.agreement import Agreement, Alone
from fabric_init.filling.computed import compute_with
from fabric_init.filling.fill import fill
from fabric_init.filling.moving import Moving
from fabric_init.filling.placement import Placement
from fabric_init.filling.plan import Wanted, make_plan
from fabric_init.filling.report import Row, dtype_name
from fabric_init.filling.slots import Slot
from fabric_init.filling.taken_over import follow
from fabric_init.filling.unfilled import ATTRIBUTE, BUILT, Built, Place, Unfilled, tensor_at, waiting_under
from fabric_init.recording.replay import view
from fabric_init.recording.tape import TensorRef

_RANKS = "_fabric_init_ranks"

# -- what hooks do -----------------------------------------------------------------------------------------------------


def _before_forward(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        _check_outside_the_graph(module)
    else:
        _check_forward(module)


def _check_forward(module: nn.Module) -> None:
    require(module, "run")
    _unhook(module)


def _check_outside_the_graph(module: nn.Module) -> None:
    torch.compiler.disable(_check_forward)(module)


class _Load(threading.local):
    """The load that this thread is in."""

    errors: Any = (
        None  # load_state_dict's list of messages, which goes through the whole call and tells it from another
    )
    top: nn.Module | None = None  # the outermost guarded module that it reaches
    waiting = 0  # how many tensors waited under that before
    whole = False  # inside `loading`, whose many calls are one load


_load = _Load()


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if _load.whole:
        return  # a load asks for the state dict, to write into it
    settle(module)
    waits = [waiting for _, waiting in waiting_under(module)]
    if waits and (_ranks(module) is None or any(_visible(module))):
        waits[0].built.refuse("be saved", waits)
    if not waits:
        _unhook(module, running=module._state_dict_pre_hooks)


def _before_load(
    module: nn.Module,
    state_dict: Any,
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: Any,
    unexpected_keys: Any,
    error_msgs: Any,
) -> None:
    if _load.whole:
        return
    waiting = vars(module).get(ATTRIBUTE)
    if waiting is not None:
        waiting.before_load(module)
    if _load.errors is not error_msgs:
        _load.errors, _load.top = error_msgs, module
        settle(module)
        _load.waiting = _count(module)


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    if _load.whole:
        return
    waiting = vars(module).get(ATTRIBUTE)
    if waiting is not None:
        waiting.settle("loaded", module)
    if _load.top is not module:
        return
    before, _load.errors, _load.top = _load.waiting, None, None
    _complete(module, before)
    if not _count(module):
        _unhook(module, running=module._load_state_dict_post_hooks)


def _items_under(model: nn.Module) -> Iterator[tuple[nn.Module, Unfilled]]:
    return ((owner, item) for owner, waiting in waiting_under(model) for item in waiting.items)


def _count(model: nn.Module) -> int:
    return sum(1 for _ in _items_under(model))


def _complete(model: nn.Module, before: int) -> None:
    """What a load does not bring keeps the model's own init, as in plain PyTorch, also where a strict load raises.

    A load that brought nothing of what waits (another prefix, an adapter alone) completes nothing. What the model's own
    init computes from tensors of which this rank has a part only, goes on waiting.
    """
    left = list(_items_under(model))
    if 0 < len(left) < before:
        sources = _sources(left)
        _initialise(
            [
                (owner, item)
                for owner, item in left
                if item.slot.ref is not None
                and sources.get(id(item), ()) is not None
                and not item.tape.never_written(item.slot.ref)
            ],
            sources,
        )
        for owner, waiting in list(waiting_under(model)):
            waiting.settle("initialised", owner)


def hook(module: nn.Module, built: Built, agreement: Agreement | None = None) -> None:
    """Let ``module`` ask before each use whether anything in it waits.

    Args:
        module: holds what waits, or is around modules that do.
        built: what it shares with the others that were built with it.
        agreement: of the ranks that only together hold what is in ``module``.
    """
    vars(module)[BUILT] = built
    vars(module)["_apply"] = Moving(module)
    if _before_forward not in module._forward_pre_hooks.values():
        # before what a strategy has put there, which may gather from other ranks
        module.register_forward_pre_hook(_before_forward, prepend=True)
        module.register_state_dict_pre_hook(_before_state_dict)
        module.register_load_state_dict_pre_hook(_before_load)
        module.register_load_state_dict_post_hook(_after_load)
    if agreement is not None:
        vars(module)[_RANKS] = agreement


def _unhook(model: nn.Module, running: Any = None) -> None:
    """Take the hooks off ``model`` and all in it.

    Of hooks that are ``running``, torch allows taking off the last alone; where ours is not, the next forward does it.
    Of modules whose tensors several ranks share, only a forward does: there all of them know that nothing waits.
    """
    for module in model.modules():
        tables: tuple[Any, ...] = (
            module._forward_pre_hooks,
            module._state_dict_pre_hooks,
            module._load_state_dict_pre_hooks,
            module._load_state_dict_post_hooks,
        )
        if any(table is running and not _is_ours(table[next(reversed(table))]) for table in tables):
            continue
        if running is not None and _RANKS in vars(module):
            continue
        for table in tables:
            for key in [key for key, hook in table.items() if _is_ours(hook)]:
                del table[key]
        vars(module).pop(_RANKS, None)
        if vars(module).pop(BUILT, None) is not None:
            del vars(module)["_apply"]


def _is_ours(hook: Any) -> bool:
    # torch keeps a hook that runs before loading in a wrapper
    return getattr(hook, "hook", hook) in (_before_forward, _before_state_dict, _before_load, _after_load)


# -- what strategies call ----------------------------------------------------------------------------------------------


def require(model: nn.Module, use: str) -> None:
    """Raise unless every tensor under ``model`` has its values, on every rank that holds a part of it.

    Raises:
        UninitializedTensorError: naming every tensor without values, and the ways to give it some.
    """
    settle(model)
    ranks = _ranks(model)
    under = [waiting for _, waiting in waiting_under(model)]
    if ranks is None:
        if under:
            under[0].built.refuse(use, under)
        return
    names = ranks.from_all([item.slot.name for item in _visible(model)])
    if names:
        (under[0].built if under else Built(type(model).__name__)).refuse(use, under, names)
    for module, _ in list(waiting_under(model)):
        del vars(module)[ATTRIBUTE]  # shards without elements, which the other ranks say are filled


def _ranks(model: nn.Module) -> Agreement | None:
    return next((found for module in model.modules() if (found := vars(module).get(_RANKS)) is not None), None)


def _visible(model: nn.Module) -> Iterator[Unfilled]:
    for module, item in _items_under(model):
        now = tensor_at(module, item.attribute)
        if now is not None and item.visible(now):
            yield item


def settle(model: nn.Module) -> list[Row]:
    """Take note of what has been written since the last look; gives the report's rows of what still waits."""
    for module in follow(model):
        built = next(waiting.built for _, waiting in waiting_under(module))
        sharded = any(item.is_part for _, item in _items_under(module))
        hook(module, built, built.agreement if sharded else None)
    for module, waiting in list(waiting_under(model)):
        waiting.settle(module=module)
    return [item.row for _, item in _items_under(model)]


def release(model: nn.Module) -> None:
    """Take the guard's hooks off a model in which nothing waits. Not to be called from one of torch's hooks."""
    if not _count(model) and _ranks(model) is None:
        _unhook(model)


@contextmanager
def loading(model: nn.Module) -> Iterator[None]:
    """A load that takes several calls, of ``state_dict`` too: what it has brought counts when it ends."""
    settle(model)
    for owner, waiting in list(waiting_under(model)):
        waiting.before_load(owner)
    before = _count(model)
    _load.whole = True
    try:
        yield
    finally:
        _load.whole = False
    for owner, waiting in list(waiting_under(model)):
        waiting.settle("loaded", owner)
    _complete(model, before)


def initialise_rest(model: nn.Module) -> None:
    """Run the model's own recorded init for every tensor under ``model`` that still waits.

    Raises:
        UninitializedTensorError: the model's own code never gives some tensor a value.
    """
    settle(model)
    waits = list(_items_under(model))

    def initialise() -> None:
        computed = [item.slot.name for _, item in waits if item.slot.ref is None]
        if computed:
            raise UninitializedTensorError(
                f"{', '.join(computed)} came in (by weight_norm, prune, a parametrization, …) when there were no "
                "values to compute with. Do that in the init_module block, or call fabric.init_missing(model) before."
            )
        partly = [item.slot.name for module, item in waits if item.changed(_at(module, item))]
        if partly:
            raise UninitializedTensorError(
                f"the model's own init would overwrite what was written into a part of {', '.join(partly)}. Call "
                "fabric.init_missing(model) first and write afterwards, or write the whole tensor."
            )
        sources = _sources(waits)
        if lost := dict.fromkeys(item.slot.name for _, item in waits if sources.get(id(item), ()) is None):
            raise UninitializedTensorError(
                f"the model's own init computes {', '.join(lost)} from other tensors, of which this rank has to have "
                "all, with their values. Call init_missing for the whole model; or load it as well, or before setup; "
                "or declare the load: init_module(checkpoint=…)."
            )
        _initialise(waits, sources)

    (_ranks(model) or Alone()).same("initialising what is missing", initialise, lambda _: "")
    for module, waiting in list(waiting_under(model)):
        waiting.settle("initialised", module)
    release(model)


_Sources = dict[int, list[tuple[TensorRef, Tensor]] | None]


def _sources(waits: Sequence[tuple[nn.Module, Unfilled]]) -> _Sources:
    """Of those that wait (by id), and that the model's own init computes from others that do not: from which.

    ``None`` where these cannot be had whole.
    """
    waits = [(module, item) for module, item in waits if item.slot.ref is not None]
    still = {_ref(item).storage for _, item in waits}
    found: _Sources = {}
    for module, item in waits:
        places = vars(module)[ATTRIBUTE].built.places
        others = dict.fromkeys(places.keys() - still)
        if item.slot.saved and (storages := item.tape.computed_from(_ref(item).storage, others)):
            tensors = [_whole(item, places[storage]) for storage in sorted(storages)]
            whole = [tensor for tensor in tensors if tensor is not None]
            found[id(item)] = whole if len(whole) == len(tensors) else None
    return found


def _whole(item: Unfilled, place: Place | None) -> tuple[TensorRef, Tensor] | None:
    if place is None or (module := place[0]()) is None:
        return None
    _, attribute, ref = place
    if (waiting := vars(module).get(ATTRIBUTE)) is not None:  # elsewhere in the model
        waiting.settle()
        if any(other.attribute == attribute for other in waiting.items):
            return None
    tensor = tensor_at(module, attribute)
    if tensor is None or item.placement.held(tensor) is not tensor or tensor.shape != ref.size:
        return None
    return ref, tensor.detach()


def _initialise(waiting: Sequence[tuple[nn.Module, Unfilled]], sources: _Sources) -> None:
    by_tensor = {id(tensor := _at(module, item)): (item, tensor) for module, item in waiting}
    items = [item for item, _ in by_tensor.values()]
    if not items:
        return
    tapes = {_ref(item).storage: item.tape for item in items}
    plan = make_plan([item.slot for item in items], tapes, None, Wanted())
    tensors = [tensor for _, tensor in by_tensor.values()]
    placement = _AsTheyAreNow(items[0].placement)
    report = fill(plan, tensors, tapes, None, placement, exact=False)
    for item, tensor, row in zip(items, tensors, report.rows, strict=True):
        for_it = sources.get(id(item))
        if for_it:
            memory = compute_with(item.slot, item.tape, for_it, tensor.device)
            with torch.no_grad():
                placement.put(item.slot, tensor, view(memory, _ref(item)))
        item.row.status, item.row.origin, item.row.dtype = "initialised", row.origin, dtype_name(tensor.dtype)


def _ref(item: Unfilled) -> TensorRef:
    assert item.slot.ref is not None
    return item.slot.ref


def _at(module: nn.Module, item: Unfilled) -> Tensor:
    tensor = tensor_at(module, item.attribute)
    assert tensor is not None  # otherwise the model does without it, and it does not wait
    return tensor


class _AsTheyAreNow:
    """A placement for tensors that may have been moved, cast or laid out anew since they were given memory."""

    def __init__(self, placement: Placement) -> None:
        self.device = placement.device
        self.region = placement.region
        self.held = placement.held

    def put(self, slot: Slot, tensor: Tensor, value: Tensor) -> Tensor:
        self.held(tensor).detach().copy_(value)  # in place: layout, views and ties stay
        return tensor
