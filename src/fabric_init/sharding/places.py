"""Where modules hold tensors, and how others are shown there for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.planning.tensors import Walked, plain_name, walked
from fabric_init.recording.storage_tags import tensor_on
from fabric_init.recording.tape import Tape, TensorRef
from fabric_init.recording.tensor import recorded_tensor


class Place(NamedTuple):
    """Where a module has a parameter or buffer: under ``key`` in ``table``, which is one of ``module``."""

    prefix: str
    module: nn.Module
    table: dict[str, Any]
    key: str
    tensor: Any

    @property
    def name(self) -> str:
        """The name in the model."""
        return plain_name(self.prefix + self.key)


def places(model: Walked, chosen: Callable[[Tensor], bool]) -> list[Place]:
    """Return the places of the parameters and buffers that are ``chosen``, in module order."""
    return [
        Place(f"{prefix}." if prefix else "", module, table, key, tensor)
        for prefix, module in walked(model).once
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None and chosen(tensor)
    ]


def plain_tensor(ref: TensorRef, tape: Tape, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the recorded tensor ``ref``, cast to ``dtype``; a parameter if ``like`` is one."""
    with DisableTorchFunction(), DisableTorchDispatch(), torch.no_grad():
        plain: Tensor = recorded_tensor(tensor_on(tape, ref), tape.storages[ref.storage].device)
    with torch.no_grad():
        if dtype not in (None, plain.dtype):
            plain = plain.to(dtype)
    return nn.Parameter(plain, like.requires_grad) if isinstance(like, nn.Parameter) else plain


@contextmanager
def shown(
    instead: Sequence[tuple[Place, Mapping[str, Tensor]]], check: Callable[[list[Place]], None]
) -> Iterator[None]:
    """Context in which modules hold other tensors, by their keys, in some of their places.

    ``check`` gets the places in which there is something else at the end, which stays there if it does not raise.
    """
    tables = {id(place.table): place.table for place, _ in instead}
    before = {at: dict(table) for at, table in tables.items()}
    changed: list[Place] = []
    try:
        for place, others in instead:
            if place.key not in others:
                del place.table[place.key]
            place.table.update(others)
        yield
        found = [
            place for place, others in instead if any(place.table.get(key) is not each for key, each in others.items())
        ]
        check(found)
        changed = found
    finally:
        stays = {(id(place.table), place.key): place.table.get(place.key) for place in changed}
        ours = {(id(place.table), key) for place, others in instead for key in (place.key, *others)}
        for at, table in tables.items():
            its = before[at] | {key: tensor for key, tensor in table.items() if (at, key) not in ours}
            table.clear()
            table.update({key: stays.get((at, key), tensor) for key, tensor in its.items()})
