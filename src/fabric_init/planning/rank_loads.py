"""The loads of a plan on this rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fabric_init.checkpoints import Box, CheckpointReader, Region, Span
from fabric_init.checkpoints.reader import read
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, Plan, PlanEntry


class Load(NamedTuple):
    """One tensor to load on this rank (a ``ReadItem`` in DCP): ``entry`` is at ``position`` in the plan."""

    position: int
    entry: PlanEntry
    region: Region | None
    device: torch.device


def loads(plan: Plan, placement: Placement) -> Iterator[Load]:
    """Yield the load of each tensor that this rank reads, in the plan's order."""
    for position, entry in enumerate(plan.entries):
        if entry.action is Action.LOAD:
            device = placement.device(entry.slot)
            yield Load(position, entry, placement.region(entry.slot), device)


def takes_element(shape: torch.Size, saved: torch.Size) -> bool:
    """Return whether a tensor of ``shape`` is a scalar that was saved with one dimension, of which it takes element 0.

    As ``torch.nn.Module.load_state_dict`` does, and as it does not the other way round.
    """
    return not len(shape) and tuple(saved) == (1,)


def read_as(reader: CheckpointReader, key: str, shape: torch.Size, region: Region | None) -> Tensor:
    """Return the region of a tensor of ``shape`` that ``reader`` has under ``key``, as one element if it is a scalar.

    Raises:
        CheckpointError: The disk or the network fails.
    """
    if isinstance(region, Span) or not takes_element(shape, reader.spec(key).shape):
        return read(reader, key, region)
    return read(reader, key, None if region is None else Box((0,), (1,))).reshape(())
