"""Refuse to run, save or export a model of which some tensor waits, on all ranks that hold a part of it."""

from __future__ import annotations

from collections import Counter
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.distributed.agreement import Agreement
from fabric_init.distributed.posted import Post, ask, post
from fabric_init.errors import RecordingError, UninitializedTensorError
from fabric_init.guard.expected_load import expected_load
from fabric_init.guard.waiting_tensors import fix_of, release_filled, unfilled
from fabric_init.planning.tensors import Walked, named_tensors, walked
from fabric_init.recording.after_block.dispatch import MSG_JIT_TRACE
from fabric_init.recording.after_block.waiting_storages import THREE_WAYS, uninitialized
from fabric_init.recording.replay.tracing import is_jit_traced
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.recording.tensor.wrappers import recorded_parts
from fabric_init.sharding.dtensor import local, ranks_with_shards
from fabric_init.sharding.whole import let_empty_shards_wait

_RANKS = "_fabric_init_ranks"
_BROKEN = "_fabric_init_broken"
_SUBJECT = "_fabric_init_subject"

_built: Counter[str] = Counter()
"""How many models of a class this rank has built in recorded blocks, which is the same on all ranks that shard them."""


def require(model: nn.Module, use: str) -> None:
    """Raise unless every tensor under ``model`` has its values, on every rank that holds a part of it.

    Raises:
        UninitializedTensorError: naming every tensor without values, and the ways to give it some.
    """
    if any(_BROKEN in vars(module) for module in model.modules()):
        _refuse_broken(model, use)
    if (load := expected_load(model)) is not None:
        load.require(model, use)
    let_empty_shards_wait(model)
    waiting = unfilled(model)
    names, fix = _lacking(model, use, waiting)
    if names:
        raise UninitializedTensorError(uninitialized(_class_of(model), use, names, fix))
    if waiting:
        with DisableTorchFunction(), torch.no_grad():
            for _, tensor in waiting:
                local(tensor).zero_()  # without elements; a rank that has some refuses by itself
    release_filled(model)
    for module in model.modules():
        vars(module).pop(_SUBJECT, None)  # the others know
    if expected_load(model) is None:
        release_forward(model)


def _lacking(model: nn.Module, use: str, waiting: list[tuple[str, Tensor]]) -> tuple[list[str], str]:
    """Return the names of the tensors that are ``waiting``, here and on the other ranks, and what to do about them."""
    agreement, ranks = ranks_of(model), ranks_with_shards(model)
    fixes = [fix] if waiting and (fix := fix_of(model)) is not None else []
    if agreement is None and not ranks:
        names = [name for name, _ in waiting]
    else:  # of a shard without elements, this rank cannot tell
        names = [name for name, tensor in waiting if local(tensor).numel()]
    if agreement is not None and (use != "run" or not ranks or len(ranks) == dist.get_world_size() - 1):
        names = agreement.from_all(names)  # its strategy does this on all of them together
    elif ranks:  # see [Note: asking before a model runs]
        own = Post(names, fixes if names else [], sorted(ranks))
        subjects = [vars(module)[_SUBJECT] for module in model.modules() if _SUBJECT in vars(module)]
        posts = [each for subject in subjects or [_class_of(model)] for each in ask(subject, own)]
        names = list(dict.fromkeys(name for each in posts for name in each.lacking))
        fixes = [fix for each in posts for fix in each.fixes] or fixes
    return names, fixes[0] if fixes else THREE_WAYS


def _class_of(model: nn.Module) -> str:
    """Return the name of the user's class: ``fully_shard`` makes one of its own from it."""
    cls = type(model)
    return cls.__bases__[1].__name__ if cls.__name__.startswith("FSDP") and len(cls.__bases__) == 2 else cls.__name__


def ranks_of(model: nn.Module) -> Agreement | None:
    """Return how the ranks that only together hold ``model`` keep in step, while some of it waits."""
    return next((found for module in model.modules() if (found := vars(module).get(_RANKS)) is not None), None)


def mark_broken(model: nn.Module) -> None:
    """Let ``model``, which a strategy has changed in part before it failed, refuse to run for good."""
    vars(model)[_BROKEN] = True
    guard_forward(model)
    model.register_state_dict_pre_hook(_before_state_dict)  # its tensors may be torch's own on meta, which can be saved


def _before_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    _refuse_broken(module, "be saved")


def _refuse_broken(model: nn.Module, use: str) -> NoReturn:
    raise UninitializedTensorError(
        f"{_class_of(model)} cannot {use}: setup, or materialize, has failed and has left it in parts. Build it anew."
    )


def guard_forward(model: nn.Module, agreement: Agreement | None = None) -> None:
    """Let ``model`` refuse to run while some of it waits: before its own code starts, and on all ranks together.

    Args:
        model: a whole model, not each module in it.
        agreement: of the ranks that only together hold it, if no rank has all of it.
    """
    if agreement is not None:
        vars(model)[_RANKS] = agreement
    if not isinstance(model, torch.jit.ScriptModule):
        _remove_forward_hook(model)
        model.register_forward_pre_hook(_before_forward, prepend=True)  # before what gathers from other ranks


def number_model(model: nn.Module) -> None:
    """Give ``model`` the name under which ranks post about it: its class, and how many of that this rank has built."""
    if _SUBJECT not in vars(model):
        name = type(model).__qualname__
        vars(model)[_SUBJECT] = f"{name} {_built[name]}"
        _built[name] += 1


def release_forward(model: Walked, *, on_all_ranks: bool = True) -> None:
    """Take that back: nothing waits any more. What is still recorded, also outside the model, becomes plain.

    Args:
        model: The model.
        on_all_ranks: Whether nothing waits on the other ranks that hold parts of it. Otherwise this one asks them
            when it first runs, if it knows them by then.
    """
    walk = walked(model)
    parts = [part for _, _, tensor in named_tensors(walk) for part in recorded_parts(tensor)]
    for tape in {found.tape for part in parts if (found := recorded(part)) is not None}:
        if tape.after_block.gives_memory:  # otherwise a strategy shards first
            tape.after_block.finish(parts)
    if not on_all_ranks and ranks_with_shards(walk):
        return
    for _, module in walk.once:
        vars(module).pop(_RANKS, None)
        if (subject := vars(module).pop(_SUBJECT, None)) is not None:
            post(subject, Post())
        _remove_forward_hook(module)


def _remove_forward_hook(module: nn.Module) -> None:
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _before_forward] if hooks else ():
        del hooks[key]


def _before_forward(module: nn.Module, args: object) -> None:
    if torch.compiler.is_compiling():  # there the tensors themselves refuse
        return
    held = is_jit_traced() and any(recorded_parts(tensor) for _, _, tensor in named_tensors(module))
    require(module, "run")
    if held:  # the traced module has what these were, which has no memory that could be saved
        guard_forward(module)
        raise RecordingError(MSG_JIT_TRACE)
