"""The values of a plan's tensors: read or replayed, or computed from those that are read, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.region import take
from fabric_init.filling.values.in_chunks import computed_in_chunks, parts_in_chunks
from fabric_init.filling.values.loaded_memory import LoadedMemory
from fabric_init.filling.values.loader import loader_for
from fabric_init.planning.derived import LoadedStorages, sources_of
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Action, Plan, PlanEntry, storage_groups
from fabric_init.recording.replay.replay import all_on, replay, replay_with, view
from fabric_init.recording.tape.liveness import covers
from fabric_init.recording.tape.tape import Tape


@dataclass(frozen=True)
class PlanValues:
    """The values that this rank keeps of a plan's tensors, each with its position in the plan.

    Args:
        plan: Its entries say what is read, computed from what is read, or replayed.
        tensors: The tensors of the plan's entries, in that order.
        tapes: The tape of each recorded storage.
        reader: The checkpoint that loaded tensors are read from.
        placement: How this rank keeps the tensors.
        loaded: The loaded tensors that others may be computed from.
        exact: Whether the random streams are replayed in order (``rng="eager"``).
    """

    plan: Plan
    tensors: Sequence[Tensor]
    tapes: Mapping[int, Tape]
    reader: CheckpointReader | None
    placement: Placement
    loaded: LoadedStorages
    exact: bool

    def one_by_one(self) -> Generator[tuple[int, Tensor], None, None]:
        """Yield positions in the plan and their values, each of which may be released before the next one is made."""
        groups = self._not_loaded_whole()
        if self.reader is not None:
            shared = self._in_shared_memory(groups)
            yield from self._read(self.reader, shared)
            mine = {
                storage: [position for position in group if position in shared] for storage, group in groups.items()
            }
            groups = {storage: group for storage, group in mine.items() if group}
        yield from self._moved()
        yield from self._computed(groups)
        large = parts_in_chunks(self.plan.entries, groups, self.tapes, self.placement, exact=self.exact)
        yield from computed_in_chunks(large.values())
        groups = {storage: positions for storage, positions in groups.items() if storage not in large}
        yield from self._replayed(groups)

    def _not_loaded_whole(self) -> dict[int, list[int]]:
        """Return the positions on each storage that needs more than one read: a replay, or a computation."""
        entries = self.plan.entries
        return {
            storage: positions
            for storage, group in storage_groups(entries).items()
            if (positions := [position for position in group if not has_own_memory(entries[position])])
            if not _is_loaded_whole(entries, positions, self.tapes[storage])
            if not any(entries[position].action is Action.WAIT or entries[position].on_use for position in positions)
        }

    def _in_shared_memory(self, groups: Mapping[int, Sequence[int]]) -> set[int]:
        """Return the positions whose values other tensors on their storage need.

        A rank that keeps a region has memory of its own for each, so only what is not loaded needs the others.
        """
        return {
            position
            for positions in groups.values()
            for position in positions
            if self.placement.region(self.plan.entries[position].slot) is None
            or any(self.plan.entries[other].action is not Action.LOAD for other in positions)
        }

    def _read(self, reader: CheckpointReader, shared: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield what is loaded into memory of its own; of the rest, a loader compares what several keys bring."""
        entries = [
            entry._replace(action=Action.KEEP) if position in shared and len(entry.keys) == 1 else entry
            for position, entry in enumerate(self.plan.entries)
        ]
        for position, value in loader_for(reader).load(replace(self.plan, entries=tuple(entries)), self.placement):
            if position not in shared:
                yield position, value

    def _moved(self) -> Iterator[tuple[int, Tensor]]:
        """Yield tensors that keep their values, on another device."""
        for position, entry in enumerate(self.plan.entries):
            slot = entry.slot
            if slot.ref is None and entry.action is not Action.LOAD and slot.real:
                device = self.placement.device(slot)
                if device != slot.device:
                    yield position, self.tensors[position].detach().to(device)

    def _computed(self, groups: dict[int, list[int]]) -> Iterator[tuple[int, Tensor]]:
        """Yield what loads bring into shared memory, and what is computed from loads; take it out of ``groups``."""
        loads: dict[tuple[Tape, torch.device], LoadedMemory] = {}
        for (tape, device, _), storages in self._derived(groups).items():
            to = all_on(device)
            if (tape, device) not in loads:
                loads[tape, device] = LoadedMemory(tape, self.loaded, self.reader, to, exact=self.exact)
            brought = loads[tape, device]
            memories = replay_with(tape, storages, brought, exact=self.exact, to=to)
            for storage in storages:
                memory, positions = memories.pop(storage), groups.pop(storage)
                if storage in brought and not self._loads_some(positions):
                    memory = memory.clone()  # which may be that of the file
                for position in positions:
                    yield position, self._kept(memory, position)
                del memory  # not kept while the next one is read
            brought.release()

    def _derived(
        self, groups: Mapping[int, Sequence[int]]
    ) -> dict[tuple[Tape, torch.device, frozenset[int]], list[int]]:
        """Return the storages that are computed from loaded ones, those together that are computed from the same.

        An earlier plan may have loaded them: that of a part of the model.
        """
        found: dict[tuple[Tape, torch.device, frozenset[int]], list[int]] = {}
        others = {tape: self.loaded.keys() | tape.brought().keys() for tape in {self.tapes[each] for each in groups}}
        for storage, positions in groups.items():
            entry, tape = self.plan.entries[positions[0]], self.tapes[storage]
            if self._loads_some(positions) or (storage in others[tape] and not entry.slot.saved):
                sources = frozenset({storage})
            else:
                sources = frozenset(sources_of(entry, self.tapes, others[tape], exact=self.exact))
            if sources:
                found.setdefault((tape, self.placement.device(entry.slot), sources), []).append(storage)
        return found

    def _loads_some(self, positions: Iterable[int]) -> bool:
        return any(self.plan.entries[position].action is Action.LOAD for position in positions)

    def _replayed(self, groups: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, Tensor]]:
        """Yield what the recorded ops compute."""
        by_place: dict[tuple[Tape, torch.device], list[int]] = {}
        for storage, positions in groups.items():
            device = self.placement.device(self.plan.entries[positions[0]].slot)
            by_place.setdefault((self.tapes[storage], device), []).append(storage)
        for (tape, device), storages in by_place.items():
            for memories in replay(tape, storages, exact=self.exact, to=all_on(device)):
                for storage, memory in memories.items():
                    for position in groups[storage]:
                        yield position, self._kept(memory, position)

    def _kept(self, memory: torch.UntypedStorage, position: int) -> Tensor:
        """Return this rank's part of a tensor whose storage is ``memory``."""
        slot = self.plan.entries[position].slot
        assert slot.ref is not None
        value, region = view(memory, slot.ref), self.placement.region(slot)
        return value if region is None else take(value, region).clone()


def has_own_memory(entry: PlanEntry) -> bool:
    """Return whether a tensor that was recorded as expanded is loaded: its elements may differ in the file."""
    return entry.action is Action.LOAD and entry.slot.ref is not None and entry.slot.ref.expanded


def _is_loaded_whole(entries: Sequence[PlanEntry], positions: Sequence[int], tape: Tape) -> bool:
    """Return whether a storage is spanned by one loaded tensor, so that nothing of it has to be replayed."""
    slot, action, *_ = entries[positions[0]]
    assert slot.ref is not None
    return len(positions) == 1 and action is Action.LOAD and covers(tape, slot.ref)
