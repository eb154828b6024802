"""The tag on a storage object that says which tape records it, and under which number.

The tag is an attribute of the storage object. torch keeps that object alive as long as any tensor on it, so looking a
tensor up is one attribute read, and a tape is freed together with the tensors that it records.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fabric_init.recording.tape import Tape, TensorRef


class Recorded(NamedTuple):
    """The attribute of a recorded storage object: the tape it was first recorded on, and its number there."""

    first_tape: Tape
    storage: int

    @property
    def tape(self) -> Tape:
        return self.first_tape.current()

    @property
    def device(self) -> torch.device:
        return self.tape.storages[self.storage].device


def recorded(tensor: torch.Tensor) -> Recorded | None:
    """Return the recording of ``tensor``'s storage, or ``None`` if it is not recorded."""
    if not tensor.is_meta:
        return None
    try:
        recording: Recorded | None = tensor.untyped_storage()._fabric_init  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError):  # not recorded; a sparse tensor has no storage
        return None
    return recording


def begin(tensor: torch.Tensor, tape: Tape, device: torch.device) -> int:
    """Start recording the storage of a new meta tensor, meant for ``device``; return its number on ``tape``."""
    storage = tensor.untyped_storage()
    number = tape.add_storage(storage.nbytes(), device)
    storage._fabric_init = Recorded(tape, number)  # type: ignore[attr-defined]
    return number


def ref_of(tensor: torch.Tensor, storage: int) -> TensorRef:
    """Return the geometry of ``tensor`` on recorded storage number ``storage``."""
    lazy_bits = tensor.is_neg() or (tensor.dtype.is_complex and tensor.is_conj())
    return TensorRef(
        storage,
        int(tensor.storage_offset()),
        tensor.size(),
        tensor.stride(),
        tensor.dtype,
        *((tensor.is_conj(), tensor.is_neg()) if lazy_bits else ()),
    )
