"""A tensor that has memory but no values cannot be used or saved.

Each module keeps the list of its own tensors that wait for values, and every read that matters passes a hook:
``forward`` and ``state_dict`` raise while anything under the module waits, ``load_state_dict`` takes note of what has
come. What waits hangs on the modules themselves, so parts can be taken out, replaced, copied and put into other models.
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
from fabric_init.guard.state import ATTRIBUTE, BUILT, ModelState, Unfilled, tensor_at, waiting_under
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
    """The load that this thread is in."""

    errors: Any = (
        None  # load_state_dict's list of messages, which goes through the whole call and tells it from another
    )
    top: weakref.ref[nn.Module] | None = None  # the outermost guarded module that it reaches
    waiting = 0  # how many tensors waited under that before
    whole = False  # inside `loading`, whose many calls are one load


_load = _CurrentLoad()


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if _load.whole:
        return  # a load asks for the state dict, to write into it
    settle(module)
    waits = [waiting for _, waiting in waiting_under(module)]
    if waits and (ranks_of(module) is None or any(_visible(module))):
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
        _load.errors, _load.top = error_msgs, weakref.ref(module)
        settle(module)
        _load.waiting = _count(module)


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    if _load.whole:
        return
    waiting = vars(module).get(ATTRIBUTE)
    if waiting is not None:
        waiting.settle("loaded", module)
    if _load.top is None or _load.top() is not module:
        return
    before, _load.errors, _load.top = _load.waiting, None, None
    _complete(module, before)
    if not _count(module):
        _unhook(module, running=module._load_state_dict_post_hooks)


def items_under(model: nn.Module) -> Iterator[tuple[nn.Module, Unfilled]]:
    return ((owner, item) for owner, waiting in waiting_under(model) for item in waiting.items)


def _count(model: nn.Module) -> int:
    return sum(1 for _ in items_under(model))


def _complete(model: nn.Module, before: int) -> None:
    """What a load does not bring keeps the model's own init, as in plain PyTorch, also where a strict load raises.

    A load that brought nothing of what waits (another prefix, an adapter alone) completes nothing. What the model's own
    init computes from tensors of which this rank has a part only, goes on waiting.
    """
    left = list(items_under(model))
    if 0 < len(left) < before:
        vars(left[0][0])[ATTRIBUTE].built.initialize(left)
        for owner, waiting in list(waiting_under(model)):
            waiting.settle("initialized", owner)


def hook(module: nn.Module, built: ModelState, agreement: Agreement | None = None) -> None:
    """Let ``module`` ask before each use whether anything in it waits.

    Args:
        module: holds what waits, or is around modules that do.
        built: what it shares with the others that were built with it.
        agreement: of the ranks that only together hold what is in ``module``.
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
        vars(module).pop(BUILT, None)
        if isinstance(vars(module).get("_apply"), GuardedApply):
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
    ranks = ranks_of(model)
    under = [waiting for _, waiting in waiting_under(model)]
    if ranks is None:
        if under:
            under[0].built.refuse(use, under)
        return
    names = ranks.from_all([item.slot.name for item in _visible(model)])
    if names:
        (under[0].built if under else ModelState(type(model).__name__, lambda _: None)).refuse(use, under, names)
    for module, waiting in list(waiting_under(model)):
        waiting.end(module)  # shards without elements, which the other ranks say are filled


def ranks_of(model: nn.Module) -> Agreement | None:
    return next((found for module in model.modules() if (found := vars(module).get(_RANKS)) is not None), None)


def _visible(model: nn.Module) -> Iterator[Unfilled]:
    for module, item in items_under(model):
        now = tensor_at(module, item.attribute)
        if now is not None and item.visible(now):
            yield item


def settle(model: nn.Module) -> list[RowRecord]:
    """Take note of what has been written since the last look; gives the report's rows of what still waits."""
    for module in follow(model):
        built = next(waiting.built for _, waiting in waiting_under(module))
        sharded = any(item.is_part for _, item in items_under(module))
        hook(module, built, built.agreement if sharded else None)
    for module, waiting in list(waiting_under(model)):
        waiting.settle(module=module)
    return [item.row for _, item in items_under(model)]


def release(model: nn.Module) -> None:
    """Take the guard's hooks off a model in which nothing waits. Not to be called from one of torch's hooks."""
    if not _count(model) and ranks_of(model) is None:
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
