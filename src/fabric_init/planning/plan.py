"""The plan of a load as plain data: its options, and the action for each tensor."""

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
    """Where a tensor's value comes from; the values are the words of the report."""

    LOAD = "loaded"
    INIT = "initialized"
    KEEP = "set when built"
    SCRATCH = "scratch"


class PlanEntry(NamedTuple):
    """The plan for one tensor. ``keys`` are the checkpoint keys that hold it: several if ties were saved separately."""

    slot: TensorInfo
    action: Action
    keys: tuple[str, ...] = ()
    spec: TensorSpec | None = None
    since: int | None = None
    """Ops with a higher number were recorded after this load was declared, in a later block."""

    @property
    def cast_from(self) -> torch.dtype | None:
        """The dtype in the checkpoint, if it differs from the model's."""
        return self.spec.dtype if self.spec is not None and self.spec.dtype != self.slot.dtype else None


class DerivedFrom(NamedTuple):
    """A loaded tensor that spans its whole recorded storage, its checkpoint key, and :attr:`PlanEntry.since`."""

    ref: TensorRef
    key: str
    since: int | None = None


@dataclass(frozen=True)
class Plan:
    """What :func:`~fabric_init.filling.execute.fill` executes. ``unexpected`` are the checkpoint's extra keys."""

    entries: tuple[PlanEntry, ...]
    unexpected: tuple[str, ...] = ()
    extras: tuple[Extra, ...] = field(default=(), compare=False)
    sources: Mapping[int, DerivedFrom] = field(default_factory=dict)
    """By storage: loaded tensors that the model no longer holds, but that others may have been computed from."""


@dataclass(frozen=True)
class LoadOptions:
    """The options of a load that concern the model; see :func:`fabric_init.materialize`.

    Raises:
        TypeError: ``reinit`` is one string.
    """

    strict: bool = True
    rename: Rename = None
    reinit: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.reinit, str):
            raise TypeError(f"reinit takes a list of globs, not one string: reinit=[{self.reinit!r}]")


def storage_groups(entries: Sequence[PlanEntry]) -> dict[int, list[int]]:
    """Return the positions of the entries on each recorded storage, by storage number."""
    groups: dict[int, list[int]] = {}
    for position, entry in enumerate(entries):
        ref: TensorRef | None = entry.slot.ref
        if ref is not None:
            groups.setdefault(ref.storage, []).append(position)
    return groups
