"""Who gets what, as plain data: what was asked of a load, and what was decided for each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch

from fabric_init.checkpoints import TensorSpec
from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.planning.extra_state import Extra
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape import TensorRef


class Action(Enum):
    """Where a tensor's value comes from."""

    LOAD = "loaded"
    INIT = "initialized"
    KEEP = "set when built"
    SCRATCH = "scratch"
    WAIT = "unfilled"


class PlanEntry(NamedTuple):
    """One tensor's part of the plan. ``keys`` are the checkpoint keys that hold it: several where ties were saved."""

    slot: TensorInfo
    action: Action
    keys: tuple[str, ...] = ()
    spec: TensorSpec | None = None
    since: int | None = None
    """Ops recorded after this number are later than the load: a block had ended, the next one was open."""

    @property
    def cast_from(self) -> torch.dtype | None:
        return self.spec.dtype if self.spec is not None and self.spec.dtype != self.slot.dtype else None


class DerivedFrom(NamedTuple):
    """A tensor that is all of its recorded storage, the checkpoint key for its value, and :attr:`PlanEntry.since`."""

    ref: TensorRef
    key: str
    since: int | None = None


@dataclass(frozen=True)
class Plan:
    """What :func:`~fabric_init.filling.execute.fill` carries out. ``unexpected`` has the keys that nothing takes."""

    entries: tuple[PlanEntry, ...]
    unexpected: tuple[str, ...] = ()
    extras: tuple[Extra, ...] = field(default=(), compare=False)
    sources: Mapping[int, DerivedFrom] = field(default_factory=dict)
    """By storage: what the model does not hold any more, but others may have been computed from."""


@dataclass(frozen=True)
class LoadOptions:
    """What the user asked of a load."""

    strict: bool = True
    rename: Rename = None
    reinit: Sequence[str] = ()


def storage_groups(entries: Sequence[PlanEntry]) -> dict[int, list[int]]:
    """Which entries lie on the same recorded storage: storage number → positions in ``entries``."""
    groups: dict[int, list[int]] = {}
    for position, entry in enumerate(entries):
        ref: TensorRef | None = entry.slot.ref
        if ref is not None:
            groups.setdefault(ref.storage, []).append(position)
    return groups
