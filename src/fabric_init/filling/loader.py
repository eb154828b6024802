"""What a checkpoint brings: each tensor, or this rank's region of it, in the model's dtype and memory layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import read
from fabric_init.planning.extra_state import Extra
from fabric_init.planning.loads import check_tie, loads
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import Plan
from fabric_init.recording.tape import TensorRef


def check_ties(plan: Plan, reader: CheckpointReader, placement: Placement) -> None:
    """Before any memory is taken: what the model ties has the same value under each of its keys.

    Raises:
        CheckpointMismatchError: it has not.
    """
    for load in loads(plan, placement):
        if len(load.entry.keys) > 1:
            value = read(reader, load.entry.keys[0], load.region)
            for key in load.entry.keys[1:]:
                check_tie(reader.path, load.entry, key, value, read(reader, key, load.region))


def load_by_itself(plan: Plan, reader: CheckpointReader, placement: Placement) -> Iterator[tuple[int, Tensor]]:
    """Positions in the plan, and the values that this rank keeps for them: it reads its own regions alone."""
    for load in loads(plan, placement):
        slot = load.entry.slot
        value = read(reader, load.entry.keys[0], load.region)
        value = value.to(device=load.device, dtype=slot.dtype)
        if load.region is None and _has_other_layout(value, slot.ref):
            laid_out = torch.empty_strided(slot.shape, slot.ref.stride, dtype=slot.dtype, device=value.device)
            value = laid_out.copy_(value)
        yield load.position, value


def _has_other_layout(value: Tensor, ref: TensorRef | None) -> bool:
    return ref is not None and value.stride() != ref.stride and not ref.expanded  # what is expanded gets room for all


def set_extra_states(extras: Iterable[Extra]) -> None:
    """Give each module what the checkpoint has for it: plain data, or a tensor. On all ranks, in the same order."""
    for module, key, reader in extras:
        others = reader.extra_state
        module.set_extra_state(others[key] if key in others else read(reader, key))
