"""Hooks of allocated models: uninitialized tensors cannot be used or saved. See ``[Note: module states]``.

Each module keeps the list of its own uninitialized tensors, and every read that matters passes a hook: ``forward`` and
``state_dict`` raise while any tensor under the module is uninitialized, and ``load_state_dict`` records which tensors
it has written.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fabric_init.distributed.agreement import Agreement
from fabric_init.guard.apply import GuardedApply
from fabric_init.guard.rehome import follow
from fabric_init.guard.state import ATTRIBUTE, BUILT, ModelState, Unfilled, states_under, tensor_at
from fabric_init.reports.registry import RowRecord

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


class _CurrentLoad(threading.local):
    """The load that runs on this thread."""

    errors: Any = (
        None  # load_state_dict's list of messages, which is one object for the whole call and so identifies it
    )
    top: weakref.ref[nn.Module] | None = None  # the outermost guarded module that it reaches
    uninitialized = 0  # the number of tensors that were uninitialized under it before
    is_grouped = False  # inside `loading`, whose many calls are one load


_load = _CurrentLoad()


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if _load.is_grouped:
        return  # a load takes the state dict, to write into it
    refresh_state(module)
    states = [state for _, state in states_under(module)]
    if states and (ranks_of(module) is None or any(_visible(module))):
        states[0].built.refuse("be saved", states)
    if not states:
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
    if _load.is_grouped:
        return
    state = vars(module).get(ATTRIBUTE)
    if state is not None:
        state.before_load(module)
    if _load.errors is not error_msgs:
        _load.errors, _load.top = error_msgs, weakref.ref(module)
        refresh_state(module)
        _load.uninitialized = _count(module)


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    if _load.is_grouped:
        return
    state = vars(module).get(ATTRIBUTE)
    if state is not None:
        state.refresh("loaded", module)
    if _load.top is None or _load.top() is not module:
        return
    before, _load.errors, _load.top = _load.uninitialized, None, None
    _complete(module, before)
    if not _count(module):
        _unhook(module, running=module._load_state_dict_post_hooks)


def items_under(model: nn.Module) -> Iterator[tuple[nn.Module, Unfilled]]:
    """Yield every uninitialized tensor under ``model``, with its module."""
    return ((owner, item) for owner, state in states_under(model) for item in state.items)


def _count(model: nn.Module) -> int:
    return sum(1 for _ in items_under(model))


def _complete(model: nn.Module, before: int) -> None:
    """Initialize what a load does not bring, as in plain PyTorch, also where a strict load raises.

    A load that brings no uninitialized tensor (another prefix, an adapter alone) completes nothing. Tensors that the
    model's own init computes from tensors of which this rank has only a shard stay uninitialized.
    """
    left = list(items_under(model))
    if 0 < len(left) < before:
        vars(left[0][0])[ATTRIBUTE].built.initialize(left)
        for owner, state in list(states_under(model)):
            state.refresh("initialized", owner)


def hook(module: nn.Module, built: ModelState, agreement: Agreement | None = None) -> None:
    """Hook ``module``, so that it raises if it is used while a tensor in it is uninitialized.

    Args:
        module: A module with uninitialized tensors, or one around such modules.
        built: The state that it shares with the modules that were built with it.
        agreement: Of the ranks that only together hold the tensors in ``module``.
    """
    vars(module)[BUILT] = built
    vars(module).setdefault("_apply", GuardedApply(module))  # over one that is recorded, too, lies the guard of that
    if _before_forward not in module._forward_pre_hooks.values():
        # before what a strategy has put there, which may gather from other ranks
        module.register_forward_pre_hook(_before_forward, prepend=True)
        module.register_state_dict_pre_hook(_before_state_dict)
        module.register_load_state_dict_pre_hook(_before_load)
        module.register_load_state_dict_post_hook(_after_load)
    if agreement is not None:
        vars(module)[_RANKS] = agreement


def _unhook(model: nn.Module, running: Any = None) -> None:
    """Remove the hooks from ``model`` and all modules in it.

    Of hooks that are ``running``, torch allows only the last to be removed; where ours is not, the next forward does
    it. On modules whose tensors several ranks share, only a forward does: there all ranks know that every tensor has
    its value.
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
        vars(module).pop(BUILT, None)
        if isinstance(vars(module).get("_apply"), GuardedApply):
            del vars(module)["_apply"]


def _is_ours(hook: Any) -> bool:
    # torch keeps a hook that runs before loading in a wrapper
    return getattr(hook, "hook", hook) in (_before_forward, _before_state_dict, _before_load, _after_load)


# -- what strategies call ----------------------------------------------------------------------------------------------


def require(model: nn.Module, use: str) -> None:
    """Raise unless every tensor under ``model`` has its value, on every rank that holds a part of it.

    Raises:
        UninitializedTensorError: Some tensors are uninitialized. The message names them and the ways to fill them.
    """
    refresh_state(model)
    ranks = ranks_of(model)
    under = [state for _, state in states_under(model)]
    if ranks is None:
        if under:
            under[0].built.refuse(use, under)
        return
    names = ranks.from_all([item.slot.name for item in _visible(model)])
    if names:
        (under[0].built if under else ModelState(type(model).__name__, lambda _: None)).refuse(use, under, names)
    for module, state in list(states_under(model)):
        state.end(module)  # shards without elements, which the other ranks say are filled


def ranks_of(model: nn.Module) -> Agreement | None:
    """Return the ranks that only together hold ``model``; ``None`` if this rank holds all of it."""
    return next((vars(module)[_RANKS] for module in model.modules() if _RANKS in vars(module)), None)


def _visible(model: nn.Module) -> Iterator[Unfilled]:
    for module, item in items_under(model):
        now = tensor_at(module, item.attribute)
        if now is not None and item.visible(now):
            yield item


def refresh_state(model: nn.Module) -> list[RowRecord]:
    """Find out what has been written since the last call, and return the report's rows of uninitialized tensors."""
    for module in follow(model):
        built = next(state.built for _, state in states_under(module))
        sharded = any(item.is_part for _, item in items_under(module))
        hook(module, built, built.agreement if sharded else None)
    for module, state in list(states_under(model)):
        state.refresh(module=module)
    return [item.row for _, item in items_under(model)]


def release(model: nn.Module) -> None:
    """Remove the hooks from a model without uninitialized tensors. Not to be called from one of torch's hooks."""
    if not _count(model) and ranks_of(model) is None:
        _unhook(model)


@contextmanager
def loading(model: nn.Module) -> Iterator[None]:
    """Treat all calls in the block, those of ``state_dict`` too, as one load, which is evaluated at its end."""
    refresh_state(model)
    for owner, state in list(states_under(model)):
        state.before_load(owner)
    before = _count(model)
    _load.is_grouped = True
    try:
        yield
    finally:
        _load.is_grouped = False
    for owner, state in list(states_under(model)):
        state.refresh("loaded", owner)
    _complete(model, before)
