"""What a load does beside the writes that it makes: it names them, and completes what it did not bring.

In plain PyTorch, what ``load_state_dict(strict=False)`` does not bring keeps the model's own init. So here a load that
has brought some of the tensors that wait gives the others theirs, also where a strict load raises.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init.guard.before_forward import guard_forward, release_forward
from fabric_init.guard.expected_load import ExpectedLoad, expected_load
from fabric_init.guard.waiting_tensors import own_tensors, release_filled, unfilled, waits
from fabric_init.planning.recorded_load.module_code import takes_extra_state
from fabric_init.planning.tensors import Walked, modules_once
from fabric_init.recording.after_block.dispatch import AfterBlock
from fabric_init.recording.tensor.recorded_tensor import recorded
from fabric_init.recording.tensor.wrappers import recorded_parts
from fabric_init.reports.registry import note_status
from fabric_init.sharding.dtensor import local
from fabric_init.sharding.whole import let_empty_shards_wait

Complete = Callable[[nn.Module], None]
"""Gives what still waits under a module the model's own init, as far as that can be."""

_COMPLETE = "_fabric_init_complete"


class _Current(threading.local):
    """The load that this thread is in."""

    errors: Any = None  # load_state_dict's list of messages, which tells one call from another
    top: weakref.ref[nn.Module] | None = None  # the outermost module that it reaches
    before: list[tuple[str, Tensor]]  # what waited under that
    laters: list[AfterBlock]  # of those
    whole = False  # inside `loading`, whose many calls are one load
    brought: list[tuple[nn.Module, str]]  # what it has written so far


_current = _Current()


class _BeforeLoad:
    """The hook before a load, of one module: torch calls this kind without the module that it is of."""

    __slots__ = ("_module",)

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, *arguments: Any) -> None:
        module = self._module()
        assert module is not None
        _before_load(module, *arguments)

    def __reduce__(self) -> Any:
        return _BeforeLoad, (self._module(),)  # a copy is the hook of the copied module


def watch_loads(model: Walked, complete: Complete) -> None:
    """Let ``load_state_dict`` of ``model``, or of modules in it, complete what it did not bring."""
    for _, module in modules_once(model):
        worth_it = module._parameters or module._modules or module._buffers or takes_extra_state(module)
        attributes = vars(module)
        if worth_it and _COMPLETE not in attributes and not isinstance(module, torch.jit.ScriptModule):  # no hooks
            attributes[_COMPLETE] = complete
            before, after = _hooks(module)
            before[_COMPLETE], after[_COMPLETE] = _BeforeLoad(module), _after_load  # torch's way costs ten times that


def _hooks(module: nn.Module) -> tuple[Any, Any]:
    """Return the tables of the hooks of a module that run before and after a load, by keys that nobody reads."""
    return module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks


def unwatch_loads(model: Walked, running: Any = None) -> None:
    """Take that back for ``model`` and all in it.

    Of hooks that are ``running``, torch allows taking off the last alone.
    """
    for _, module in modules_once(model):
        if _COMPLETE not in vars(module):
            continue
        tables = _hooks(module)
        if any(table is running and next(reversed(table)) != _COMPLETE for table in tables):
            continue
        del vars(module)[_COMPLETE]
        for table in tables:
            table.pop(_COMPLETE, None)


def _before_load(
    module: nn.Module,
    state_dict: Any,
    prefix: str,
    local_metadata: Any,
    strict: Any,
    missing: Any,
    extra: Any,
    errors: Any,
) -> None:
    if not _current.whole and _current.errors is not errors:
        _current.errors, _current.top = errors, weakref.ref(module)
        _begin(module)
    _current.brought += [(module, name) for name, _ in own_tensors(module) if prefix + name in state_dict]


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    if _current.whole or _current.top is None or _current.top() is not module:
        return
    _current.errors, _current.top = None, None
    complete: Complete | None = vars(module).get(_COMPLETE)
    _end(module, complete)
    _release_loaded(module, running=module._load_state_dict_post_hooks)


@contextmanager
def loading(model: nn.Module) -> Iterator[None]:
    """Context for a load that takes several calls, of ``state_dict`` too: it is complete when the context ends."""
    complete = next((found for m in model.modules() if (found := vars(m).get(_COMPLETE)) is not None), None)
    if complete is None:
        yield
        return
    _begin(model)
    _current.whole = True
    try:
        yield
    finally:
        _current.whole = False
        for later in _current.laters:
            later.status = "written by the user"
    _end(model, complete)
    _release_loaded(model)


def _release_loaded(model: nn.Module, running: Any = None) -> None:
    """Let a model go of which nothing waits here; one whose ranks meet before it runs does so then."""
    expected = expected_load(model)
    if not unfilled(model) and (expected is None or expected.came):
        unwatch_loads(model, running)
        if expected is None:
            release_forward(model, on_all_ranks=False)


def _begin(module: nn.Module) -> None:
    let_empty_shards_wait(module)
    _current.before, _current.brought = unfilled(module), []
    _current.laters = _laters(module)
    for later in _current.laters:
        later.status = "loaded"


def _end(module: nn.Module, complete: Complete | None) -> None:
    before, brought = _current.before, _current.brought
    _current.before, _current.brought = [], []
    if isinstance(complete, ExpectedLoad):
        expected = [(its, name) for its, name in brought if isinstance(vars(its).get(_COMPLETE), ExpectedLoad)]
        if expected:
            complete.note(expected)
    for _, tensor in before:  # assign=True has put others in their places
        for part in () if _holds(module, tensor) else recorded_parts(tensor):
            found = recorded(part)
            if found is not None and found.memory is None:
                found.tape.after_block.waiting.note_status(found.storage, "loaded")
                for owners in found.tape.after_block.owners:
                    owners.filled(found.storage, "loaded")
    left = unfilled(module)
    written = {id(tensor) for its, name in brought for held, tensor in own_tensors(its) if held == name}
    empty = [local(tensor) for _, tensor in left if not local(tensor).numel() and id(tensor) in written]
    if empty:  # shards without elements, which a load has nothing to write to
        with torch.no_grad():
            for tensor in empty:
                tensor.zero_()
        left = unfilled(module)
    for later in _current.laters:
        later.status = "initialized"
    try:
        if complete is not None and 0 < len(left) < len(before):
            complete(module)
            for name, tensor in left:
                if not waits(tensor):
                    holder, _, key = name.rpartition(".")
                    note_status(module.get_submodule(holder), key, "initialized")
    finally:
        for later in _current.laters:
            later.status = "written by the user"
        _current.laters = []
    release_filled(module)
    if any(local(tensor) is not tensor for _, tensor in left):  # before what fully_shard gathers since the block
        guard_forward(module)


def _holds(model: nn.Module, tensor: Tensor) -> bool:
    return any(held is tensor for module in model.modules() for _, held in own_tensors(module))


def _laters(model: nn.Module) -> list[AfterBlock]:
    found: dict[int, AfterBlock] = {}
    for module in model.modules():
        for _, tensor in own_tensors(module):
            for part in recorded_parts(tensor):
                if (record := recorded(part)) is not None:
                    found[id(record.tape.after_block)] = record.tape.after_block
    return list(found.values())
