"""Track uninitialized tensors through ``to`` and ``half``, which move values and sentinels, and ``to_empty``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fabric_init.errors import UninitializedTensorError
from fabric_init.guard.sentinels import (
    are_sentinels,
    has_exact_sentinel,
    has_sentinel,
    is_float,
    place_sentinels,
    sentinel_elements,
)
from fabric_init.guard.state import ATTRIBUTE, BUILT, Unfilled, own_tensors, states_under, tensor_at, version_in


class _OutermostCall(threading.local):
    """The outermost call on this thread, which handles all modules under it: strategies apply to parts again."""

    running = False


_outermost = _OutermostCall()


class GuardedApply:
    """Replace the ``_apply`` of a guarded module, which ``to``, ``half`` and ``to_empty`` call.

    Tensors that are uninitialized before the call are so after it, and values are kept.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = self._owner()
        guarded = []
        if not _outermost.running:
            for owner, state in list(states_under(module)):
                state.refresh(module=owner)
            guarded = list(states_under(module))
        if not guarded:
            type(module)._apply(module, fn, recurse)
            return module
        were = [
            [_Before.of(item, tensor_at(owner, item.attribute)) for item in state.items] for owner, state in guarded
        ]
        values = list(_values(module))
        if values and fn(torch.empty(0)).is_meta:
            raise UninitializedTensorError(
                f"{type(module).__name__} cannot go to the meta device: {', '.join(name for _, name, _ in values[:5])} "
                "would lose values that no load brings back. Leave that out, or load the uninitialized tensors first."
            )
        _outermost.running = True
        try:
            type(module)._apply(module, fn, recurse)
        finally:
            _outermost.running = False
            for (owner, state), before in zip(guarded, were, strict=True):
                state.items = [
                    _moved(item, tensor_at(owner, item.attribute), was)
                    for item, was in zip(state.items, before, strict=True)
                ]
            for owner, name, value in values:
                _put_back(tensor_at(owner, name), value)
        return module

    def _owner(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedApply:
        module = self._owner()
        return GuardedApply(memo.get(id(module), module))

    def __reduce__(self) -> tuple[type[GuardedApply], tuple[nn.Module]]:
        return GuardedApply, (self._owner(),)


class _Before(NamedTuple):
    address: int | None = None
    partly_written: bool = False

    @classmethod
    def of(cls, item: Unfilled, tensor: Tensor | None) -> _Before:
        if tensor is None or tensor.is_meta:
            return cls()
        return cls(item.placement.held(tensor).data_ptr(), item.changed(tensor))


def _moved(item: Unfilled, now: Tensor | None, before: _Before) -> Unfilled:
    """Return ``item`` for the tensor's present memory, where sentinels are placed unless they were moved along."""
    if now is None or now.is_meta:
        return item
    held = item.placement.held(now)
    if held.data_ptr() == before.address:
        return item
    samples, partly_written = sentinel_elements(held), before.partly_written
    if samples is not None:
        if is_float(samples):
            kept = has_sentinel(samples)
        else:
            kept = has_exact_sentinel(samples) if partly_written else are_sentinels(samples)
        if not kept:
            partly_written = False
            with torch.inference_mode(now.is_inference()):
                place_sentinels(held.data)  # .data: not a write by the user, so no version counts it
    return replace(item, tensor=now, version=version_in(item.placement, now) - partly_written)


def _values(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the tensors with values of a model that is partly uninitialized, such as non-persistent buffers."""
    for module in model.modules():
        if BUILT in vars(module):
            state = vars(module).get(ATTRIBUTE)
            uninitialized = {item.attribute for item in state.items} if state is not None else ()
            for name, tensor in own_tensors(module).items():
                if name not in uninitialized and not tensor.is_meta:
                    yield module, name, _part(tensor).detach()


def _put_back(now: Tensor | None, value: Tensor) -> None:
    if now is None or now.is_meta or _part(now).data_ptr() == value.data_ptr():
        return
    with torch.inference_mode(now.is_inference()), torch.no_grad():
        _part(now).copy_(value)


def _part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, by whatever means it was sharded."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local
