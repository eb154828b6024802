"""Compute large tensors chunk by chunk, straight into what this rank keeps: see ``recording/replay/chunks.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fabric_init.checkpoints.region import Region, Window, copy_part, window
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, PlanEntry
from fabric_init.recording.replay.chunks import Chunks, chunks, chunks_of
from fabric_init.recording.replay.replay import real_execution
from fabric_init.recording.replay.threads import threaded
from fabric_init.recording.tape.tape import Tape


@dataclass(eq=False)
class RankPart:
    """What this rank keeps of one tensor."""

    position: int
    chunks: Chunks
    shape: tuple[int, ...]
    region: Region | None
    device: torch.device
    out: Tensor | None = None
    left: int = 0  # jobs still to be done

    def starts(self, where: Window) -> list[tuple[int, int]]:
        """Return the chunks that this rank needs, as in :func:`~fabric_init.recording.replay.chunks.chunks_of`."""
        end = where.start + where.extent
        return [(start, stop) for start, stop in chunks_of(self.chunks.numel) if start < end and stop > where.start]

    def compute_all(self, starts: Iterable[tuple[int, int]], where: Window) -> None:
        """Compute some chunks, and keep this rank's part of them."""
        for start, stop in starts:
            self.compute(start, stop, where)

    def compute(self, start: int, stop: int, where: Window) -> None:
        """Compute one chunk, and keep this rank's part of it."""
        assert self.out is not None
        dense = where.extent == self.out.numel()
        if dense and where.start <= start and stop <= where.start + where.extent:
            self.chunks.compute(start, self.out.view(-1)[start - where.start : stop - where.start])
            return
        values = torch.empty(stop - start, dtype=self.out.dtype, device=self.device)
        self.chunks.compute(start, values)
        copy_part(values, start, self.shape, self.region, self.out)


def parts_in_chunks(
    entries: Sequence[PlanEntry],
    groups: Mapping[int, Sequence[int]],
    tapes: Mapping[int, Tape],
    placement: Placement,
    *,
    exact: bool,
) -> dict[int, RankPart]:
    """Return which storages can be computed by chunks, and what this rank keeps of each.

    Args:
        entries: Those of a plan.
        groups: By storage: the positions of the tensors on it.
        tapes: The tape of each storage.
        placement: How this rank keeps them.
        exact: As in :func:`~fabric_init.recording.replay.replay.replay`.
    """
    found = {}
    for storage, (position, *others) in groups.items():
        slot = entries[position].slot
        if others or entries[position].action is not Action.INIT or slot.ref is None:
            continue
        if (how := chunks(tapes[storage], slot.ref, exact=exact)) is not None:
            region, device = placement.region(slot), placement.device(slot)
            found[storage] = RankPart(position, how, tuple(slot.ref.size), region, device)
    return found


def computed_in_chunks(parts: Iterable[RankPart]) -> Iterator[tuple[int, Tensor]]:
    """Yield positions in the plan and the values that this rank keeps, in the order in which they are completed."""
    by_device: dict[torch.device, list[RankPart]] = {}
    for part in parts:
        by_device.setdefault(part.device, []).append(part)
    for device, here in by_device.items():
        workers = torch.get_num_threads() if device.type == "cpu" else 1
        for part in threaded(_run, _jobs(here), workers):
            part.left -= 1
            if part.left <= 0:
                assert part.out is not None
                value, part.out = part.out, None
                yield part.position, value


_CHUNKS_A_JOB = 16
"""Starting a job takes a tenth of a millisecond, computing a chunk a few tenths."""

_Job = tuple[RankPart, Callable[[], None]]


def _run(job: _Job) -> RankPart:
    part, compute = job
    with torch.inference_mode(False), real_execution():  # both belong to the thread
        compute()
    return part


def _jobs(parts: Iterable[RankPart]) -> Iterator[_Job]:
    """Yield the chunks of one part after the other. Memory is taken when the first chunk of a part is asked for."""
    for part in parts:
        where = window(part.shape, part.region)
        part.out = torch.empty(where.sizes, dtype=part.chunks.dtype, device=part.device)
        starts = part.starts(where)
        jobs = [starts[first : first + _CHUNKS_A_JOB] for first in range(0, len(starts), _CHUNKS_A_JOB)] or [[]]
        part.left = len(jobs)
        for job in jobs:
            yield part, partial(part.compute_all, job, where)
