"""Refuse to run, save or export a model of which some tensor waits, on all ranks that hold a part of it."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.distributed.agreement import Agreement, agreement_among
from fabric_init.errors import RecordingError, UninitializedTensorError
from fabric_init.guard.expected_load import expected_load
from fabric_init.guard.waiting_tensors import (
    fix_of,
    release_filled,
    unfilled,
)
from fabric_init.planning.tensors import (
    Walked,
    named_tensors,
    walked,
)
from fabric_init.recording.after_block.dispatch import MSG_JIT_TRACE
from fabric_init.recording.after_block.waiting_storages import THREE_WAYS, uninitialized
from fabric_init.recording.replay.tracing import is_jit_traced
from fabric_init.recording.tensor.recorded_tensor import (
    recorded,
)
from fabric_init.recording.tensor.wrappers import recorded_parts
from fabric_init.sharding.dtensor import local, ranks_with_shards
from fabric_init.sharding.whole import let_empty_shards_wait

_RANKS = "_fabric_init_ranks"
_BROKEN = "_fabric_init_broken"


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
    ranks = ranks_of(model)
    agreements = [agreement_among(each) for each in ranks_with_shards(model)] if ranks is None else [ranks]
    names = [name for name, tensor in waiting if not agreements or local(tensor).numel()]
    for each in agreements:  # of a shard without elements, this rank cannot tell
        names = each.from_all(names)
    if names:
        fixes = [fix] if (fix := fix_of(model)) is not None else []
        for each in agreements:
            fixes = each.from_all(fixes)
        raise UninitializedTensorError(uninitialized(_class_of(model), use, names, fixes[0] if fixes else THREE_WAYS))
    if waiting:
        with DisableTorchFunction(), torch.no_grad():
            for _, tensor in waiting:
                local(tensor).zero_()  # without elements; the other ranks say that theirs are filled
    release_filled(model)
    release_forward(model)


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


def release_forward(model: Walked, *, on_all_ranks: bool = True) -> None:
    """Take that back: nothing waits any more. What is still recorded, also outside the model, becomes plain.

    Args:
        model: The model.
        on_all_ranks: Whether nothing waits on the other ranks that hold parts of it. Otherwise these ask one another
            when it first runs.
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
