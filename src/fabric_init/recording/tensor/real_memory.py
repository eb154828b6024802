"""Plain tensors on the memory of recorded ones whose values are there."""

from __future__ import annotations

import torch
from torch import Tensor

from fabric_init._torch_internals import TensorBase
from fabric_init.recording.replay.replay import real_execution, view
from fabric_init.recording.tape.tape import TensorRef
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor
from fabric_init.recording.tensor.storage_tags import StorageTag


def real_tensor(found: StorageTag, ref: TensorRef) -> Tensor:
    """Return the tensor at ``ref`` of a storage whose values are there."""
    assert found.memory is not None
    storage, offset = found.memory
    elements, rest = divmod(offset, ref.dtype.itemsize)
    assert not rest
    with real_execution():
        return view(storage, ref._replace(offset=ref.offset + elements))


def plain_memory(tensor: RecordedTensor) -> Tensor:
    """Return a plain tensor on real memory that torch itself has put behind a recorded tensor (``p.data = real``)."""
    with real_execution():
        storage = TensorBase.untyped_storage(tensor)
        plain = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        return plain.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
