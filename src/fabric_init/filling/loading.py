"""What a checkpoint brings: each tensor, or this rank's region of it, in the model's dtype and memory layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader, Region
from fabric_init.checkpoints.remote import AnyPath
from fabric_init.errors import CheckpointError, CheckpointMismatchError, is_out_of_memory
from fabric_init.filling.extra_state import Extra, extra_states
from fabric_init.filling.placement import Placement
from fabric_init.filling.plan import Action, Entry, Plan


class Load(NamedTuple):
    """One tensor to be loaded, as this rank wants it. ``position`` is that of ``entry`` in the plan."""

    position: int
    entry: Entry
    region: Region | None
    device: torch.device


def loads(plan: Plan, placement: Placement) -> Iterator[Load]:
    """What this rank wants of each tensor that is to be loaded, in the plan's order."""
    for position, entry in enumerate(plan.entries):
        if entry.action is Action.LOAD:
            device = placement.device(entry.slot)
            yield Load(position, entry, placement.region(entry.slot), device)


def check_ties(plan: Plan, reader: CheckpointReader, placement: Placement) -> None:
    """Before any memory is taken: what the model ties has the same value under each of its keys.

    Raises:
        CheckpointMismatchError: it has not.
    """
    for load in loads(plan, placement):
        if len(load.entry.keys) > 1:
            value = read(reader, load.entry.keys[0], load.region)
            for key in load.entry.keys[1:]:
                check_tie(reader.path, load.entry, key, value, read(reader, key, load.region))


def read(reader: CheckpointReader, key: str, region: Region | None = None) -> Tensor:
    """As ``reader`` reads it.

    Raises:
        CheckpointError: the disk or the network fails.
    """
    try:
        return reader.read(key, region)
    except OSError as error:
        if isinstance(error, CheckpointError) or is_out_of_memory(error):
            raise
        raise CheckpointError(f"{reader.path}: {key!r} cannot be read: {error}.") from error


def load_by_itself(plan: Plan, reader: CheckpointReader, placement: Placement) -> Iterator[tuple[int, Tensor]]:
    """Positions in the plan, and the values that this rank keeps for them: it reads its own regions alone."""
    for load in loads(plan, placement):
        slot = load.entry.slot
        value = read(reader, load.entry.keys[0], load.region)
        value = value.to(device=load.device, dtype=slot.dtype)
        if load.region is None and slot.ref is not None and value.stride() != slot.ref.stride:
            laid_out = torch.empty_strided(slot.shape, slot.ref.stride, dtype=slot.dtype, device=value.device)
            value = laid_out.copy_(value)
        yield load.position, value


def set_extra_states(extras: Iterable[Extra]) -> None:
    """Give each module what the checkpoint has for it: plain data, or a tensor. On all ranks, in the same order."""
    for module, key, reader in extras:
        others = extra_states(reader)
        module.set_extra_state(others[key] if key in others else read(reader, key))


def check_tie(path: AnyPath, entry: Entry, key: str, value: Tensor, other: Tensor) -> None:
    """What the model ties has the same value under each of its keys: ``value`` under the first, ``other`` here."""
    if not torch.allclose(value, other, rtol=0, atol=0, equal_nan=True):
        raise CheckpointMismatchError(
            f"{path}: {entry.keys[0]} and {key} hold different values, but in the model they are one tied tensor "
            f"({' = '.join(entry.slot.names)}). Build the model untied, or drop one key with rename."
        )
