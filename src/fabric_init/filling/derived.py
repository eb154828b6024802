"""Compute tensors that the constructor derives from loaded ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fabric_init.checkpoints import CheckpointReader
from fabric_init.planning.loads import read_as
from fabric_init.planning.plan import DerivedFrom
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.replay import real_execution, replay_with
from fabric_init.recording.tape import Tape, TensorRef


def compute(
    slot: TensorInfo,
    tapes: Mapping[int, Tape],
    sources: Iterable[DerivedFrom],
    reader: CheckpointReader,
    device: torch.device,
    *,
    exact: bool,
) -> torch.UntypedStorage:
    """Return the storage of ``slot``, computed from the values of its ``sources``, which are read in full."""
    # the same order on every rank: reading may be for all of them together
    in_order = sorted(sources, key=lambda source: source.ref.storage)
    assert slot.ref is not None
    return compute_with(
        slot,
        tapes[slot.ref.storage],
        ((ref, read_as(reader, key, ref.size, None)) for ref, key, _ in in_order),
        device,
        exact=exact,
    )


def compute_with(
    slot: TensorInfo,
    tape: Tape,
    sources: Iterable[tuple[TensorRef, Tensor]],
    device: torch.device,
    *,
    exact: bool = False,
) -> torch.UntypedStorage:
    """Return the storage of ``slot``, computed from these values of its ``sources``."""
    assert slot.ref is not None
    with real_execution():
        known = {ref.storage: _laid_out(value, ref, device) for ref, value in sources}
        return replay_with(tape, slot.ref.storage, known, exact=exact, to=lambda _: device)


def _laid_out(value: Tensor, ref: TensorRef, device: torch.device) -> torch.UntypedStorage:
    """Return ``value`` in memory of its own, laid out like ``ref``, which spans a storage."""
    memory = torch.empty_strided(ref.size, ref.stride, dtype=ref.dtype, device=device)
    return memory.copy_(value).untyped_storage()
