"""The plan of a load as plain data: its options, and the action for each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch

from fabric_init._text import dtype_name
from fabric_init.checkpoints import TensorSpec
from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.tape.tape import TensorRef


class Action(Enum):
    """Where a tensor's value comes from; the values are the words of the report."""

    LOAD = "loaded"
    INIT = "initialized"
    KEEP = "set when built"
    SCRATCH = "scratch"
    WAIT = "unfilled"  # no memory and no values until a later load or init


class PlanEntry(NamedTuple):
    """The plan for one tensor. ``keys`` are the checkpoint keys that hold it: several if ties were saved separately."""

    slot: TensorInfo
    action: Action
    keys: tuple[str, ...] = ()
    spec: TensorSpec | None = None
    since: int | None = None
    """Ops with a higher number were recorded after this load was declared, in a later block."""
    on_use: bool = False
    """Whether the own init is only run when the tensor is used, or when all others have their values."""
    made_of: PlanEntry | None = None
    """The plan for the plain tensor that this one is made of, in its place, see [Note: made of plain tensors]."""
    kind: str = ""
    """The class of what is made of that."""

    @property
    def cast_from(self) -> torch.dtype | None:
        """The dtype in the checkpoint, if it differs from the model's."""
        return self.spec.dtype if self.spec is not None and self.spec.dtype != self.slot.dtype else None

    def __repr__(self) -> str:
        source = f" from {' = '.join(self.keys)}" if self.keys else ""
        cast = f", cast from {dtype_name(self.cast_from)}" if self.cast_from is not None else ""
        tensor = f"{' = '.join(self.slot.names)}{list(self.slot.shape)} {dtype_name(self.slot.dtype)}"
        return f"{tensor}: {self.action.value}{source}{cast}"


class Conversion(NamedTuple):
    """What ``to()``, ``contiguous()`` or ``reshape()`` has ``written`` where it was given ``read``."""

    written: TensorRef
    read: TensorRef


class Loaded(NamedTuple):
    """A loaded tensor that others may be computed from, and its checkpoint key.

    It is on the storage in question, or on the one that the last of the ``conversions`` has made of that.
    """

    ref: TensorRef
    key: str
    conversions: tuple[Conversion, ...] = ()


_SHOWN = 10  # entries of a plan that is printed


@dataclass(frozen=True)
class Plan:
    """What :func:`~fabric_init.filling.execute.fill` executes. ``unexpected`` are the checkpoint's extra keys."""

    entries: tuple[PlanEntry, ...]
    unexpected: tuple[str, ...] = ()
    sources: tuple[Loaded, ...] = ()
    """Loaded tensors that the model may no longer hold, but that others may have been computed from."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know of what is loaded, in words."""

    @property
    def waits(self) -> bool:
        """Whether some tensors are left to a later load."""
        return any(entry.action is Action.WAIT for entry in self.entries)

    @property
    def plain(self) -> list[PlanEntry]:
        """The entries, but for those of what is made of plain tensors the plans for these, each once."""
        return list({id(each): each for each in (entry.made_of or entry for entry in self.entries)}.values())

    def summary(self) -> str:
        """Return how many tensors get their value in which way, in words."""
        plain = self.plain
        counts = Counter(entry.action.value for entry in plain)
        ways = ", ".join(f"{number:,} {action}" for action, number in counts.most_common())
        casts = sum(entry.cast_from is not None for entry in plain)
        return (
            f"{len(plain):,} tensors: {ways or 'nothing to do'}"
            + (f"; {casts:,} cast" if casts else "")
            + (f"; {len(self.unexpected):,} unexpected checkpoint keys" if self.unexpected else "")
        )

    def __repr__(self) -> str:
        plain = self.plain
        lines = [repr(entry) for entry in plain[:_SHOWN]]
        if len(plain) > _SHOWN:
            lines.append(f"… {len(plain) - _SHOWN:,} more tensors …")
        return "\n  ".join([f"Plan: {self.summary()}", *lines])


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
