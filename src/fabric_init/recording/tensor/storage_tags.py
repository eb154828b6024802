"""The tag on a storage object that says which tape records it, and under which number.

The tag is an attribute of the storage object. torch keeps that object alive as long as any tensor on it, so looking a
tensor up is one attribute read, and a tape is freed together with the tensors that it records.
"""

from __future__ import annotations

import weakref

import torch

from fabric_init._torch_internals import refuse_memory
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_storage import RecordedStorage


class StorageTag:
    """The attribute of a recorded storage object: the tape it was first recorded on, and its number there.

    ``memory`` is where its values are, and at which byte, once they have come: tensors that nobody has turned into
    plain ones by then, such as views in a closure, find them there.

    ``is_marked`` says whether the storage object has this attribute already.
    """

    __slots__ = ("__weakref__", "first_tape", "is_marked", "memory", "storage")

    def __init__(self, first_tape: Tape, storage: int) -> None:
        self.first_tape = first_tape
        self.storage = storage
        self.memory: tuple[torch.UntypedStorage, int] | None = None
        self.is_marked = False

    @property
    def tape(self) -> Tape:
        tape = self.first_tape
        return tape if tape.joined is None else tape.current()

    @property
    def device(self) -> torch.device:
        return self.tape.storages[self.storage].device


def recorded_storage(tensor: torch.Tensor) -> StorageTag | None:
    """Return the recording of the storage of a plain meta ``tensor``, or ``None`` if it is not recorded."""
    if not tensor.is_meta:
        return None
    try:
        recording: StorageTag | None = tensor.untyped_storage()._fabric_init  # type: ignore[attr-defined]
    except (AttributeError, NotImplementedError):  # not recorded; a sparse tensor has no storage
        return None
    return recording


def begin(tensor: torch.Tensor, tape: Tape, device: torch.device) -> int:
    """Start recording the storage of a new meta tensor, meant for ``device``; return its number on ``tape``."""
    record = begin_unmarked(tensor, tensor.untyped_storage().nbytes(), tape, device)
    mark(tensor, record)
    return record.storage


def begin_unmarked(tensor: torch.Tensor, nbytes: int, tape: Tape, device: torch.device) -> StorageTag:
    """Start recording a storage that only one recorded tensor is on, which keeps what is returned."""
    refuse_memory(tensor)  # code in C++ would take the null pointer of a meta tensor for the memory of a real one
    number = tape.add_storage(nbytes, device)
    record = StorageTag(tape, number)
    tape.records[number] = weakref.ref(record)
    return record


def mark(tensor: torch.Tensor, record: StorageTag) -> None:
    """Put the recording of a storage on it, which a plain meta ``tensor`` is on."""
    storage = tensor.untyped_storage()
    storage._fabric_init = record  # type: ignore[attr-defined]
    storage.__class__ = RecordedStorage
    record.is_marked = True


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


def tensor_on(tape: Tape, ref: TensorRef) -> torch.Tensor:
    """Return a plain meta tensor of the geometry ``ref`` on a recorded storage, of which no tensor need be left."""
    storage = torch.UntypedStorage(tape.storages[ref.storage].nbytes, device="meta")
    tensor = torch.empty(0, dtype=ref.dtype, device="meta").set_(storage, ref.offset, ref.size, ref.stride)
    refuse_memory(tensor)
    mark(tensor, StorageTag(tape, ref.storage))
    return tensor
