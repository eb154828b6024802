"""How many bytes each rank reads of a checkpoint, and how long that takes at a given bandwidth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fabric_init.checkpoints import Region
from fabric_init.planning.derived import loaded_storages, sources_of
from fabric_init.planning.plan import Action, Plan, PlanEntry, storage_groups
from fabric_init.recording.tape import Tape
from fabric_init.strategies import fsdp2, zero3
from fabric_init.tools.forecast.training_config import TrainingConfig

REGIONS: Mapping[str, Callable[[torch.Size, int, int], Region]] = {
    "fsdp2": fsdp2.region_on,
    "deepspeed_stage_3": zero3.region_on,
}
"""What a rank reads of a parameter, by shape, rank and number of ranks. Other strategies read all of each."""


@dataclass(frozen=True)
class IoEstimate:
    """What is read, in bytes of the checkpoint; headers aside, which take some 100 bytes a tensor.

    Attributes:
        way: ``"local"``: each rank reads what it keeps; ``"broadcast"``: rank 0 reads, and sends to the others.
        by_rank: what each rank reads.
        from_storage: what leaves the storage, all machines together: the ranks of one share what it has read.
        bandwidth: bytes a second; ``None`` if not known.
        seconds: how long the slowest rank takes if each has that bandwidth for itself.
        seconds_shared: how long all take if they share it: a file server, say.
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
    """What loading after ``plan`` reads, rank by rank. Arguments as in :class:`Reading`."""
    region = REGIONS.get(setting.strategy) if way == "local" else None
    by_rank, from_storage = [0] * setting.ranks, 0
    for (shape, itemsize, cut), count in Counter(_reads(plan, tapes)).items():
        whole = shape.numel()
        for first in range(0, setting.ranks, setting.devices):  # machine by machine
            here = range(first, first + setting.devices)
            parts = [region(shape, rank, setting.ranks).numel if cut and region else whole for rank in here]
            for rank, part in zip(here, parts, strict=True):
                by_rank[rank] += count * itemsize * part
            from_storage += count * itemsize * min(whole, sum(parts))  # parts of one tensor are apart, or each is all
    if way == "broadcast":
        by_rank[1:] = [0] * (setting.ranks - 1)
        from_storage = by_rank[0]
    times = (None, None) if bandwidth is None else (max(by_rank) / bandwidth, from_storage / bandwidth)
    return IoEstimate(way, tuple(by_rank), from_storage, bandwidth, *times)


def _reads(plan: Plan, tapes: Mapping[int, Tape]) -> Iterator[tuple[torch.Size, int, bool]]:
    """Shape and bytes an element of each tensor that is read, and whether a strategy may cut it."""
    for entry in plan.entries:
        if entry.action is Action.LOAD and entry.spec is not None:
            for _ in entry.keys:  # ties are compared
                yield entry.spec.shape, entry.spec.dtype.itemsize, entry.slot.kind == "parameter"
    for entry in _sources(plan, tapes):
        assert entry.spec is not None
        yield entry.spec.shape, entry.spec.dtype.itemsize, False


def _sources(plan: Plan, tapes: Mapping[int, Tape]) -> Iterable[PlanEntry]:
    """What is read once more, and whole, because something that is not loaded is computed from it."""
    loaded = loaded_storages(plan, tapes)
    by_key = {entry.keys[0]: entry for entry in plan.entries if entry.action is Action.LOAD}
    since = {storage: source.since for storage, source in loaded.items()}
    for positions in storage_groups(plan.entries).values():
        if len(positions) == 1:
            for storage in sources_of(plan.entries[positions[0]], tapes, since):
                yield by_key[loaded[storage].key]
