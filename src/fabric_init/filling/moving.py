"""Waiting tensors that get other memory: by ``to`` or ``half``, which bring their marks along, or by ``to_empty``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fabric_init.filling.marks import has_exact_mark, has_mark, is_float, is_mark, marked_elements, place_mark
from fabric_init.filling.unfilled import ATTRIBUTE, Unfilled, Waiting, tensor_at, version_in


class Moving:
    """In the place of a guarded module's ``_apply``, under ``to``, ``half`` and ``to_empty``.

    What waited for values before it waits for them afterwards.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = self._owner()
        waiting: Waiting | None = vars(module).get(ATTRIBUTE)
        if waiting is None:
            return self._as_ever(fn, recurse)
        waiting.settle(module=module)
        before = [(item, _Before.of(item, tensor_at(module, item.attribute))) for item in waiting.items]
        try:
            return self._as_ever(fn, recurse)
        finally:
            waiting.items = [_moved(item, tensor_at(module, item.attribute), was) for item, was in before]

    def _as_ever(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> nn.Module:
        module = self._owner()
        type(module)._apply(module, fn, recurse)
        return module

    def _owner(self) -> nn.Module:
        module = self._module()
        assert module is not None
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Moving:
        module = self._owner()
        return Moving(memo.get(id(module), module))

    def __reduce__(self) -> tuple[type[Moving], tuple[nn.Module]]:
        return Moving, (self._owner(),)


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
