"""Estimate the bytes that each rank reads of a checkpoint, and the time that takes at a given bandwidth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fabric_init.planning.derived import loaded_storages, sources_of
from fabric_init.planning.plan import Action, Plan, PlanEntry, storage_groups
from fabric_init.recording.tape.tape import Tape
from fabric_init.tools.forecast.training_config import TrainingConfig


@dataclass(frozen=True)
class IoEstimate:
    """What is read, in bytes of the checkpoint, without its headers (about 100 bytes per tensor).

    Attributes:
        way: ``"local"``: each rank reads what it keeps; ``"broadcast"``: rank 0 reads, and sends to the others.
        by_rank: the bytes that each rank reads.
        from_storage: the bytes that leave the storage for all machines; ranks of one machine share its page cache.
        bandwidth: bytes per second; ``None`` if unknown.
        seconds: the time of the slowest rank if each has that bandwidth for itself.
        seconds_shared: the time of all ranks if they share it, as on a file server.
    """

    way: Literal["local", "broadcast"]
    by_rank: tuple[int, ...]
    from_storage: int
    bandwidth: float | None
    seconds: float | None
    seconds_shared: float | None


def reading_of(
    plan: Plan,
    tapes: Mapping[int, Tape],
    setting: TrainingConfig,
    way: Literal["local", "broadcast"],
    bandwidth: float | None,
) -> IoEstimate:
    """Return what loading by ``plan`` reads, rank by rank. Arguments as in :class:`IoEstimate`."""
    region = setting.model.region if way == "local" else None
    by_rank, from_storage = [0] * setting.ranks, 0
    for (shape, itemsize, cut), count in Counter(_reads(plan, tapes)).items():
        numel = shape.numel()
        for first in range(0, setting.ranks, setting.devices):  # machine by machine
            here = range(first, first + setting.devices)
            parts = [region(shape, rank, setting.ranks).numel if cut and region else numel for rank in here]
            for rank, part in zip(here, parts, strict=True):
                by_rank[rank] += count * itemsize * part
            # parts of one tensor are disjoint, or each of them is the full tensor
            from_storage += count * itemsize * min(numel, sum(parts))
    if way == "broadcast":
        by_rank[1:] = [0] * (setting.ranks - 1)
        from_storage = by_rank[0]
    times = (None, None) if bandwidth is None else (max(by_rank) / bandwidth, from_storage / bandwidth)
    return IoEstimate(way, tuple(by_rank), from_storage, bandwidth, *times)


def _reads(plan: Plan, tapes: Mapping[int, Tape]) -> Iterator[tuple[torch.Size, int, bool]]:
    """Yield shape and bytes per element of each tensor that is read, and whether a strategy may shard it."""
    for entry in plan.entries:
        if entry.action is Action.LOAD and entry.spec is not None:
            for _ in entry.keys:  # ties are compared
                yield entry.spec.shape, entry.spec.dtype.itemsize, entry.slot.kind == "parameter"
    for entry in _read_again(plan, tapes):
        assert entry.spec is not None
        yield entry.spec.shape, entry.spec.dtype.itemsize, False


def _read_again(plan: Plan, tapes: Mapping[int, Tape]) -> Iterable[PlanEntry]:
    """Yield the entries that are read again, unsharded, because a tensor that is not loaded is computed from them."""
    loaded = loaded_storages(plan, tapes)
    by_key = {entry.keys[0]: entry for entry in plan.entries if entry.action is Action.LOAD}
    for positions in storage_groups(plan.entries).values():
        if len(positions) == 1:
            for storage in sources_of(plan.entries[positions[0]], tapes, loaded):
                yield from (by_key[each.key] for each in loaded[storage])
