"""Shards that have no values yet: their own init, and where a strategy keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fabric_init.guard.models import local
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import PlanEntry
from fabric_init.recording.storage_tags import begin
from fabric_init.recording.tape import Tape
from fabric_init.recording.tensor import RecordedTensor, recorded, recorded_tensor

_SHARDS = "_fabric_init_shards"


class WaitingShards(NamedTuple):
    """What a sharded model got in place of tensors that waited, with what it takes to initialize them."""

    entries: Sequence[PlanEntry]
    tensors: Sequence[Tensor]
    tapes: Mapping[int, Tape]
    placement: Placement


def hold_shards(model: nn.Module, shards: WaitingShards) -> None:
    """Remember for ``model`` what it takes to initialize its shards."""
    vars(model)[_SHARDS] = (*vars(model).get(_SHARDS, ()), shards)


def forget_shards(model: nn.Module) -> None:
    """Forget that: nothing waits any more."""
    for module in model.modules():
        vars(module).pop(_SHARDS, None)


def waiting_shards(model: nn.Module) -> Iterator[WaitingShards]:
    """Yield the shards under ``model`` that still wait."""
    below = {
        id(tensor) for module in model.modules() for tensor in (*module._parameters.values(), *module._buffers.values())
    }
    for module in model.modules():
        for shards in vars(module).get(_SHARDS, ()):
            left = [
                (entry, tensor)
                for entry, tensor in zip(shards.entries, shards.tensors, strict=True)
                if id(tensor) in below and isinstance(local(tensor), RecordedTensor)
            ]
            if left:
                yield shards._replace(entries=[entry for entry, _ in left], tensors=[tensor for _, tensor in left])


def empty_shard(sizes: Sequence[int], entry: PlanEntry, device: torch.device, tape: Tape, model: str) -> RecordedTensor:
    """Return a recorded tensor in place of a shard of these ``sizes``, which waits for values of its own."""
    meta = torch.empty(tuple(sizes), dtype=entry.slot.dtype, device="meta")
    storage = begin(meta, tape, device)
    tape.later.waiting.begin(storage, model, entry.slot.name)
    return recorded_tensor(meta, device)


def is_partly_written(tensor: Tensor) -> bool:
    """Return whether some of a waiting shard was written."""
    found = recorded(local(tensor))
    return found is not None and found.tape.later.waiting.is_partly_written(found.storage)
