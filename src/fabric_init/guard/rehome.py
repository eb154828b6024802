"""Tensors without values that other modules, or other names, have taken over from those that they were built under."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from fabric_init.guard.state import (
    ATTRIBUTE,
    BUILT,
    ModuleState,
    Unfilled,
    all_waiting,
    own_tensors,
    tensor_at,
    version_in,
)


def follow(model: nn.Module) -> Iterator[nn.Module]:
    """Let the modules in ``model`` wait for all that they hold without values, whoever it was built for.

    ``convert_sync_batchnorm`` puts tensors into modules of its own; ``weight_norm``, ``prune`` and parametrizations
    give them other names and compute more from them. Gives the modules that are not guarded yet.
    """
    known: dict[int, tuple[ModuleState, Unfilled]] = {}
    same: dict[int, tuple[ModuleState, Unfilled]] = {}
    for waiting in all_waiting():
        for item in waiting.items:
            if item.slot.ref is not None and item.tensor is not None and not item.tensor.is_meta:
                known[_address(item.placement.held(item.tensor))] = waiting, item
                same[id(item.tensor)] = waiting, item
    known.pop(0, None)  # no elements
    if not same:
        return
    modules = list(model.modules())
    for module in modules:
        for name, tensor in own_tensors(module).items():
            if (found := same.get(id(tensor))) is not None:
                _wait(module, found[0], replace(found[1], attribute=name))
            elif not tensor.is_meta and (found := known.get(_address(tensor))) is not None:
                waiting, item = found
                if tensor.shape == item.slot.shape:
                    version = version_in(item.placement, tensor)
                    _wait(module, waiting, replace(item, attribute=name, tensor=tensor, version=version))
    for module in modules:
        here: ModuleState | None = vars(module).get(ATTRIBUTE)
        if here is not None:
            for item in [item for item in here.items if _is_computed(module, item)]:
                _wait_for_what_computes_it(module, here, item)
    for module in modules:
        if BUILT not in vars(module) and any(ATTRIBUTE in vars(below) for below in module.modules()):
            yield module


def _address(tensor: Tensor) -> int:
    return int(getattr(tensor, "_local_tensor", tensor).data_ptr())


def _wait(module: nn.Module, other: ModuleState, item: Unfilled) -> None:
    waiting = vars(module).get(ATTRIBUTE)
    if waiting is None:
        waiting = vars(module)[ATTRIBUTE] = ModuleState(module, other.built, own_tensors(module))
    if all(known.attribute != item.attribute for known in waiting.items):
        waiting.items.append(item)


def _is_computed(module: nn.Module, item: Unfilled) -> bool:
    """Whether ``module`` now computes what was a tensor of its own."""
    if tensor_at(module, item.attribute) is not None:
        return False
    return item.attribute in vars(module) or hasattr(type(module), item.attribute)


def _wait_for_what_computes_it(module: nn.Module, waiting: ModuleState, item: Unfilled) -> None:
    """In its place wait for what has come into ``module`` since: it was computed from memory without values."""
    prefix = item.slot.name.rpartition(".")[0]
    for path, inner in module.named_modules(prefix=prefix):
        if inner is not module and BUILT in vars(inner):
            continue
        for name, tensor in own_tensors(inner).items():
            if inner is module and name in waiting.names:
                continue
            full = f"{path}.{name}" if path else name
            slot = item.slot._replace(names=(full,), ref=None, shape=tensor.shape, dtype=tensor.dtype)
            version = version_in(item.placement, tensor)
            _wait(inner, waiting, replace(item, attribute=name, slot=slot, tensor=tensor, version=version))
    waiting.items.remove(item)
