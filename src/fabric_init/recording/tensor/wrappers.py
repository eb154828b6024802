"""Tensors that have no memory of their own, but hold others that have: ``torch``'s wrapper subclasses.

[Note: wrapped recorded tensors]
torchao's quantized tensors and DTensors are objects of a class with ``__tensor_flatten__``, which names the tensors
that they hold. An operator on one is for its class to answer, in terms of these inner tensors, and those may be
recorded ones: what quantizes a recorded weight, or cuts it into shards, is recorded like everything else. So a wrapper
needs no values of its own. It waits while an inner tensor waits, and it is filled when those are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchFunction
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, claim_all, recorded, recorded_ref

_NO_WRAPPERS = frozenset({Tensor, nn.Parameter, RecordedTensor})
"""Nearly all tensors are of one of these classes."""


def is_wrapper_class(kind: type) -> bool:
    """Return whether tensors of this class hold others in the place of memory."""
    return hasattr(kind, "__tensor_flatten__")


def is_wrapper(tensor: Tensor) -> bool:
    """Return whether ``tensor`` holds others in the place of memory."""
    kind = type(tensor)
    return kind not in _NO_WRAPPERS and is_wrapper_class(kind)


def is_sharded_class(kind: type) -> bool:
    """Return whether tensors of this class are DTensors: the tensor that one holds is this rank's part of it."""
    return is_wrapper_class(kind) and hasattr(kind, "_local_tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor."""
    kind = type(tensor)
    return kind not in _NO_WRAPPERS and is_sharded_class(kind)


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """Return the tensors that a wrapper holds, by the names of its attributes."""
    names: Iterable[str] = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    held = {name: getattr(tensor, name) for name in names}
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}  # a DTensor names its mesh, too


def named_parts(tensor: Tensor, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that have the memory of ``tensor``, by name: itself, or those that it holds, however deep."""
    if is_wrapper(tensor):
        for key, inner in inner_tensors(tensor).items():
            yield from named_parts(inner, f"{name}.{key}")
    else:
        yield name, tensor


def with_memory(tensor: Tensor) -> Iterator[Tensor]:
    """Yield them without their names."""
    return (part for _, part in named_parts(tensor))


def recorded_parts(tensor: Tensor) -> list[RecordedTensor]:
    """Return those of the tensors with the memory of ``tensor`` that are recorded.

    ``p.data = t``, for a ``p`` with values and a ``t`` that waits, asks neither of them outside a block: it puts ``p``
    on the recorded storage as a plain meta tensor. Such a one is claimed here, where all that looks for tensors passes.
    """
    if isinstance(tensor, RecordedTensor):
        return [tensor]
    if type(tensor) in _NO_WRAPPERS and not tensor.is_meta:
        return []
    with DisableTorchFunction(), torch.no_grad():
        claim_all(with_memory(tensor))
    return [part for part in with_memory(tensor) if isinstance(part, RecordedTensor)]


def note_registered(tensor: Tensor, before: Tensor | None) -> None:
    """Note that a module registers ``tensor`` in the place of ``before``.

    If that is a wrapper, its inner tensors may have been made of what was there.
    """
    if type(tensor) is RecordedTensor:  # nearly all
        _note_storage(tensor)
        return
    with DisableTorchFunction():
        if not is_wrapper(tensor):
            _note_storage(tensor)
            return
        plain = None if before is None else recorded(before)
        for part in recorded_parts(tensor):
            inner = recorded(part)
            if inner is not None and before is not None and plain is not None:
                inner.tape.made_of.setdefault(inner.storage, recorded_ref(before, plain.storage))


def _note_storage(tensor: Tensor) -> None:
    found = recorded(tensor)
    if found is not None:
        found.tape.registered.add(found.storage)


def is_recorded_shard(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor whose shard is recorded. Asking for the class would import DTensors."""
    return type(tensor) is not RecordedTensor and isinstance(getattr(tensor, "_local_tensor", None), RecordedTensor)
