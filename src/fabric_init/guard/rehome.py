"""Uninitialized tensors that have come to other modules, or under other names, than those they were built with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from fabric_init.guard.state import (
    ATTRIBUTE,
    BUILT,
    ModuleState,
    Unfilled,
    all_states,
    own_tensors,
    tensor_at,
    version_in,
)


def follow(model: nn.Module) -> Iterator[nn.Module]:
    """Track the uninitialized tensors in ``model`` by the modules that hold them now.

    ``convert_sync_batchnorm`` puts tensors into modules of its own; ``weight_norm``, ``prune`` and parametrizations
    rename them and compute others from them.

    Yields:
        The modules that are not guarded yet.
    """
    known: dict[int, tuple[ModuleState, Unfilled]] = {}
    same: dict[int, tuple[ModuleState, Unfilled]] = {}
    for state in all_states():
        for item in state.items:
            if item.slot.ref is not None and item.tensor is not None and not item.tensor.is_meta:
                known[_address(item.placement.held(item.tensor))] = state, item
                same[id(item.tensor)] = state, item
    known.pop(0, None)  # no elements
    if not same:
        return
    modules = list(model.modules())
    for module in modules:
        for name, tensor in own_tensors(module).items():
            if (found := same.get(id(tensor))) is not None:
                _track(module, found[0], replace(found[1], attribute=name))
            elif not tensor.is_meta and (found := known.get(_address(tensor))) is not None:
                state, item = found
                if tensor.shape == item.slot.shape:
                    version = version_in(item.placement, tensor)
                    _track(module, state, replace(item, attribute=name, tensor=tensor, version=version))
    for module in modules:
        here: ModuleState | None = vars(module).get(ATTRIBUTE)
        if here is not None:
            for item in [item for item in here.items if _is_computed(module, item)]:
                _track_inputs(module, here, item)
    for module in modules:
        if BUILT not in vars(module) and any(ATTRIBUTE in vars(below) for below in module.modules()):
            yield module


def _address(tensor: Tensor) -> int:
    return int(getattr(tensor, "_local_tensor", tensor).data_ptr())


def _track(module: nn.Module, other: ModuleState, item: Unfilled) -> None:
    state = vars(module).get(ATTRIBUTE)
    if state is None:
        state = vars(module)[ATTRIBUTE] = ModuleState(module, other.built, own_tensors(module))
    if all(known.attribute != item.attribute for known in state.items):
        state.items.append(item)


def _is_computed(module: nn.Module, item: Unfilled) -> bool:
    """Return whether ``module`` now computes what was a tensor of its own."""
    if tensor_at(module, item.attribute) is not None:
        return False
    return item.attribute in vars(module) or hasattr(type(module), item.attribute)


def _track_inputs(module: nn.Module, state: ModuleState, item: Unfilled) -> None:
    """Track in its place the tensors that have come into ``module`` since, computed from uninitialized memory."""
    prefix = item.slot.name.rpartition(".")[0]
    for path, inner in module.named_modules(prefix=prefix):
        if inner is not module and BUILT in vars(inner):
            continue
        for name, tensor in own_tensors(inner).items():
            if inner is module and name in state.names:
                continue
            full = f"{path}.{name}" if path else name
            slot = item.slot._replace(names=(full,), ref=None, shape=tensor.shape, dtype=tensor.dtype)
            version = version_in(item.placement, tensor)
            _track(inner, state, replace(item, attribute=name, slot=slot, tensor=tensor, version=version))
    state.items.remove(item)
