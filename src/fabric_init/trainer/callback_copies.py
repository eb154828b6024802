"""Copies that callbacks of a Trainer have made of its model before that was filled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init.guard.waiting_tensors import waits
from fabric_init.planning.tensors import registered_tensors
from fabric_init.recording.tape.op_properties import only_copies
from fabric_init.recording.tensor.recorded_tensor import recorded

_DEPTH = 4


@contextmanager
def copies_filled(model: nn.Module, callbacks: Iterable[Any]) -> Iterator[None]:
    """Context that fills ``model``; what ``callbacks`` have copied from it has the same values afterwards.

    Callbacks that average or prune copy it in their ``setup``, where Lightning's own models have values.
    """
    originals = {found.storage: tensor for _, _, tensor in registered_tensors(model) if (found := recorded(tensor))}
    own = {id(module) for module in model.modules()}
    copies = [
        (tensor, original)
        for module in {id(each): each for callback in callbacks for each in _modules_in(callback)}.values()
        if id(module) not in own
        for _, _, tensor in registered_tensors(module)
        if waits(tensor) and (original := _copied_from(tensor, originals)) is not None
    ]
    yield
    with torch.no_grad():
        for tensor, original in copies:
            if not waits(original):
                tensor.copy_(original)


def _copied_from(tensor: Tensor, originals: dict[int, Tensor]) -> Tensor | None:
    """Return which of ``originals``, by recorded storage, a recorded ``tensor`` is a copy of."""
    found = recorded(tensor)
    storage = None if found is None else found.storage
    while found is not None and storage is not None and storage not in originals:
        writers = found.tape.writers.get(storage, ())
        op = found.tape.ops[writers[-1]] if len(writers) == 1 else None
        read = {ref.storage for ref in op.reads()} - {storage} if op is not None and only_copies(op.func) else set()
        storage = read.pop() if len(read) == 1 else None
    original = None if storage is None else originals[storage]
    return original if original is not None and original.shape == tensor.shape else None


def _modules_in(value: Any, depth: int = 0) -> Iterator[nn.Module]:
    """Yield the modules that an object has in its attributes, and in containers and objects there."""
    if isinstance(value, nn.Module):
        yield value
    elif depth < _DEPTH and not callable(value):
        inner: Iterable[Any] = ()
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        else:
            inner = getattr(value, "__dict__", {}).values()
        for each in list(inner):
            yield from _modules_in(each, depth + 1)
