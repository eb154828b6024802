"""The values of a plan's tensors: read or replayed, or computed from those that are read, one after the other."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.region import take
from fabric_init.filling.values.compute_derived import compute
from fabric_init.filling.values.in_chunks import computed_in_chunks, parts_in_chunks
from fabric_init.filling.values.loader import loader_for
from fabric_init.planning.derived import sources_of
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, DerivedFrom, Plan, PlanEntry, storage_groups
from fabric_init.planning.rank_loads import read_as
from fabric_init.recording.replay.replay import Brought, replay, replay_with, view
from fabric_init.recording.tape.liveness import covers
from fabric_init.recording.tape.tape import Tape


def values_of(
    plan: Plan,
    tensors: Sequence[Tensor],
    tapes: Mapping[int, Tape],
    reader: CheckpointReader | None,
    placement: Placement,
    loaded: Mapping[int, DerivedFrom],
    *,
    exact: bool,
) -> Generator[tuple[int, Tensor], None, None]:
    """Yield positions in the plan and the values that this rank keeps for them."""
    entries = plan.entries
    to_replay = {
        storage: positions
        for storage, group in storage_groups(entries).items()
        if (positions := [position for position in group if not has_own_memory(entries[position])])
        if not _is_loaded_whole(entries, positions, tapes[storage])
        if not any(entries[position].action is Action.WAIT or entries[position].on_use for position in positions)
    }
    shared = {
        position
        for positions in to_replay.values()
        for position in positions
        # a rank that keeps a region has memory of its own for each, so only what is not loaded needs the others
        if placement.region(entries[position].slot) is None
        or any(entries[other].action is not Action.LOAD for other in positions)
    }
    parts: dict[int, Tensor] = {}  # loaded into memory that other tensors share
    if reader is not None:
        for position, value in loader_for(reader).load(plan, placement):
            if position in shared:
                parts[position] = value
            else:
                yield position, value
        for positions in to_replay.values():
            for position in positions:  # in the same order on every rank
                slot = entries[position].slot
                if position in parts and placement.region(slot) is not None:
                    parts[position] = read_as(reader, entries[position].keys[0], slot.shape, None)
        mine = {storage: [position for position in group if position in shared] for storage, group in to_replay.items()}
        to_replay = {storage: group for storage, group in mine.items() if group}
    for position, entry in enumerate(entries):
        slot = entry.slot
        if slot.ref is None and entry.action is not Action.LOAD and slot.real:
            device = placement.device(slot)
            if device != slot.device:
                yield position, tensors[position].detach().to(device)
    derived = _derived(entries, to_replay, tapes, placement, loaded, exact=exact)
    for (tape, device, sources), storages in derived.items():
        if reader is not None and sources <= loaded.keys():
            # the same order on every rank: reading may be for all of them together
            values = (
                (ref, read_as(reader, key, ref.size, None)) for ref, key in (loaded[each] for each in sorted(sources))
            )
            memories = compute(storages, tape, values, device, exact=exact)
        else:  # from what an earlier load has brought
            memories = replay_with(tape, storages, Brought(tape, device), exact=exact, to=lambda _, at=device: at)  # type: ignore[misc]
        for storage in storages:
            memory = memories.pop(storage)
            for position in to_replay.pop(storage):
                yield position, _kept(memory, entries[position], placement)
            del memory  # not kept while the next one is read
    large = parts_in_chunks(entries, to_replay, tapes, placement, exact=exact)
    yield from computed_in_chunks(large.values())
    to_replay = {storage: positions for storage, positions in to_replay.items() if storage not in large}
    yield from _replayed(entries, to_replay, tapes, parts, placement, exact=exact)


def _derived(
    entries: Sequence[PlanEntry],
    groups: Mapping[int, Sequence[int]],
    tapes: Mapping[int, Tape],
    placement: Placement,
    loaded: Mapping[int, DerivedFrom],
    *,
    exact: bool,
) -> dict[tuple[Tape, torch.device, frozenset[int]], list[int]]:
    """Return the storages that are computed from loaded ones, those together that are computed from the same.

    An earlier plan may have loaded them: that of a part of the model.
    """
    found: dict[tuple[Tape, torch.device, frozenset[int]], list[int]] = {}
    others = {tape: loaded.keys() | tape.brought().keys() for tape in {tapes[storage] for storage in groups}}
    for storage, positions in groups.items():
        entry = entries[positions[0]]
        sources = frozenset(sources_of(entry, tapes, others[tapes[storage]], exact=exact))
        if sources and all(entries[position].action is Action.INIT for position in positions):
            key = tapes[storage], placement.device(entry.slot), sources
            found.setdefault(key, []).append(storage)
    return found


def _kept(memory: torch.UntypedStorage, entry: PlanEntry, placement: Placement) -> Tensor:
    """Return this rank's part of a tensor whose storage is ``memory``."""
    assert entry.slot.ref is not None
    value, region = view(memory, entry.slot.ref), placement.region(entry.slot)
    return value if region is None else take(value, region).clone()


def has_own_memory(entry: PlanEntry) -> bool:
    """Return whether a tensor that was recorded as expanded is loaded: its elements may differ in the file."""
    return entry.action is Action.LOAD and entry.slot.ref is not None and entry.slot.ref.expanded


def _is_loaded_whole(entries: Sequence[PlanEntry], positions: Sequence[int], tape: Tape) -> bool:
    """Return whether a storage is spanned by one loaded tensor, so that nothing of it has to be replayed."""
    slot, action, *_ = entries[positions[0]]
    assert slot.ref is not None
    return len(positions) == 1 and action is Action.LOAD and covers(tape, slot.ref)


def _replayed(
    entries: Sequence[PlanEntry],
    groups: Mapping[int, Sequence[int]],
    tapes: Mapping[int, Tape],
    parts: dict[int, Tensor],
    placement: Placement,
    *,
    exact: bool,
) -> Iterator[tuple[int, Tensor]]:
    by_tape: dict[int, list[int]] = {}
    for storage in groups:
        by_tape.setdefault(id(tapes[storage]), []).append(storage)
    for storages in by_tape.values():
        tape = tapes[storages[0]]
        targets = {placement.device(entries[groups[storage][0]].slot) for storage in storages}
        for target in sorted(targets, key=str):
            here = [s for s in storages if placement.device(entries[groups[s][0]].slot) == target]
            wanted: Iterable[dict[int, torch.UntypedStorage]] = replay(
                tape,
                here,
                exact=exact,
                to=lambda _, target=target: target,  # type: ignore[misc]
            )
            for memories in wanted:
                for storage, memory in memories.items():
                    for position in groups[storage]:
                        entry = entries[position]
                        if position in parts:
                            assert entry.slot.ref is not None
                            view(memory, entry.slot.ref).copy_(parts.pop(position))
                        yield position, _kept(memory, entry, placement)
