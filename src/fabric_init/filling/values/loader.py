"""Load the tensors of a plan: each one, or this rank's region of it, in the model's dtype and memory layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import places
from fabric_init.checkpoints.storage.read_ahead import Place, ReadAhead
from fabric_init.planning.checks.ties import check_values
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Plan
from fabric_init.planning.rank_loads import Load, loads, read_as, takes_element
from fabric_init.recording.tape.tape import TensorRef


@runtime_checkable
class Loader(Protocol):
    """How this rank loads the tensors of a plan from one checkpoint.

    A reader that also has these methods, as :class:`~fabric_init.distributed.broadcast.BroadcastReader` does, loads in
    its own way; every other reader is wrapped in a :class:`LocalLoader`.
    """

    def check_ties(self, plan: Plan, placement: Placement) -> None:
        """Check, before memory is allocated, that tied tensors have one value in the checkpoint.

        A loader that checks this while it loads does nothing here.

        Raises:
            CheckpointMismatchError: A tied tensor has different values under its keys.
        """
        ...

    def load(self, plan: Plan, placement: Placement) -> Iterator[tuple[int, Tensor]]:
        """Yield positions in the plan and the values that this rank keeps for them, in any order."""
        ...


class LocalLoader:
    """Load from ``reader`` without the other ranks: each rank reads its own regions."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def check_ties(self, plan: Plan, placement: Placement) -> None:
        if not any(len(entry.keys) > 1 for entry in plan.entries):
            return
        for load in loads(plan, placement):
            if len(load.entry.keys) > 1:
                values = (self._read(load, key) for key in load.entry.keys)
                check_values(self._reader.path, load.entry, values)

    def load(self, plan: Plan, placement: Placement) -> Iterator[tuple[int, Tensor]]:
        in_order = self._in_file_order(loads(plan, placement))
        with ReadAhead([where for where, _ in in_order]) as ahead:
            for index, (_, load) in enumerate(in_order):
                ahead.reading(index)
                slot = load.entry.slot
                value = self._read(load, load.entry.keys[0])
                if value.dtype != slot.dtype or value.device != load.device:
                    value = value.to(device=load.device, dtype=slot.dtype)
                if load.region is None and slot.ref is not None and _has_other_layout(value, slot.ref):
                    strided = torch.empty_strided(slot.shape, slot.ref.stride, dtype=slot.dtype, device=value.device)
                    value = strided.copy_(value)
                yield load.position, value

    def _in_file_order(self, wanted: Iterable[Load]) -> list[tuple[list[Place], Load]]:
        """Return loads and the places that each reads, from front to back of each file."""
        files: dict[object, int] = {}
        ordered = []
        for load in wanted:
            key = load.entry.keys[0]
            as_saved = takes_element(load.entry.slot.shape, self._reader.spec(key).shape)
            where = list(places(self._reader, key, None if as_saved else load.region))
            first = (files.setdefault(where[0].file, len(files)), where[0].start) if where else (-1, 0)
            ordered.append((first, where, load))
        ordered.sort(key=lambda each: each[0])
        return [(where, load) for _, where, load in ordered]

    def _read(self, load: Load, key: str) -> Tensor:
        return read_as(self._reader, key, load.entry.slot.shape, load.region)


def _has_other_layout(value: Tensor, ref: TensorRef) -> bool:
    return value.stride() != ref.stride and not ref.expanded  # the elements of an expanded tensor share memory


def loader_for(reader: CheckpointReader) -> Loader:
    """Return ``reader`` itself if it is a loader, and a :class:`LocalLoader` for it otherwise."""
    return reader if isinstance(reader, Loader) else LocalLoader(reader)
