"""Models that wait get other memory: by ``to`` or ``half``, which bring values and marks along, or by ``to_empty``."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fabric_init.errors import UninitializedTensorError
from fabric_init.guard.sentinels import has_exact_mark, has_mark, is_float, is_mark, marked_elements, place_mark
from fabric_init.guard.state import ATTRIBUTE, BUILT, Unfilled, own_tensors, tensor_at, version_in, waiting_under


class _OutermostCall(threading.local):
    """The call that this thread is in, which sees to all modules in it: strategies move their parts once more."""

    running = False


_outermost = _OutermostCall()


class GuardedApply:
    """In the place of a guarded module's ``_apply``, under ``to``, ``half`` and ``to_empty``.

    What waited for values before it waits for them afterwards; what had values, has them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = self._owner()
        waits = []
        if not _outermost.running:
            for owner, waiting in list(waiting_under(module)):
                waiting.settle(module=owner)
            waits = list(waiting_under(module))
        if not waits:
            type(module)._apply(module, fn, recurse)
            return module
        were = [
            [_Before.of(item, tensor_at(owner, item.attribute)) for item in waiting.items] for owner, waiting in waits
        ]
        values = list(_values(module))
        if values and fn(torch.empty(0)).is_meta:
            raise UninitializedTensorError(
                f"{type(module).__name__} cannot go to the meta device: {', '.join(name for _, name, _ in values[:5])} "
                "would lose values that no load brings back. Leave that out, or load first what waits."
            )
        _outermost.running = True
        try:
            type(module)._apply(module, fn, recurse)
        finally:
            _outermost.running = False
            for (owner, waiting), before in zip(waits, were, strict=True):
                waiting.items = [
                    _moved(item, tensor_at(owner, item.attribute), was)
                    for item, was in zip(waiting.items, before, strict=True)
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
    written_in_part: bool = False

    @classmethod
    def of(cls, item: Unfilled, tensor: Tensor | None) -> _Before:
        if tensor is None or tensor.is_meta:
            return cls()
        return cls(item.placement.held(tensor).data_ptr(), item.changed(tensor))


def _moved(item: Unfilled, now: Tensor | None, before: _Before) -> Unfilled:
    """``item`` for the memory that it has now; with marks, if none were brought there."""
    if now is None or now.is_meta:
        return item
    held = item.placement.held(now)
    if held.data_ptr() == before.address:
        return item
    found, written_in_part = marked_elements(held), before.written_in_part
    if found is not None:
        kept = has_mark(found) if is_float(found) else has_exact_mark(found) if written_in_part else is_mark(found)
        if not kept:
            written_in_part = False
            with torch.inference_mode(now.is_inference()):
                place_mark(held.data)  # .data: nobody has written, so nothing is to be counted
    return replace(item, tensor=now, version=version_in(item.placement, now) - written_in_part)


def _values(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """What has values already in a model of which the rest waits: non-persistent buffers, say, which no load brings."""
    for module in model.modules():
        if BUILT in vars(module):
            waiting = vars(module).get(ATTRIBUTE)
            waits = {item.attribute for item in waiting.items} if waiting is not None else ()
            for name, tensor in own_tensors(module).items():
                if name not in waits and not tensor.is_meta:
                    yield module, name, _part(tensor).detach()


def _put_back(now: Tensor | None, value: Tensor) -> None:
    if now is None or now.is_meta or _part(now).data_ptr() == value.data_ptr():
        return
    with torch.inference_mode(now.is_inference()), torch.no_grad():
        _part(now).copy_(value)


def _part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, whoever has sharded it."""
    found: Tensor = getattr(tensor, "_local_tensor", tensor)
    return found
