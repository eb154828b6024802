"""Sources: recorded tensors whose values are those of a checkpoint key."""

from __future__ import annotations

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import read
from fabric_init.recording.recorder import Recorder
from fabric_init.recording.tensor import META, recorded_tensor


class ReadTensor:
    """The recorded call that makes a source: it reads a tensor of a checkpoint.

    Args:
        reader: The open checkpoint.
        key: The tensor's key in it.
    """

    __name__ = "read"

    def __init__(self, reader: CheckpointReader, key: str) -> None:
        self.reader = reader
        self.key = key

    def __call__(self, *, device: torch.device) -> Tensor:
        """Return the whole tensor on ``device``."""
        return read(self.reader, self.key).to(device)

    def __repr__(self) -> str:
        return f"read({self.key})"


def source_tensor(recorder: Recorder, reader: CheckpointReader, key: str) -> Tensor:
    """Return a recorded tensor, meant for the CPU, that has the shape, dtype and values of a checkpoint key."""
    spec, cpu = reader.spec(key), torch.device("cpu")
    with DisableTorchFunction(), DisableTorchDispatch():
        meta = torch.empty(spec.shape, dtype=spec.dtype, device=META)
        ref = recorder.new_storage(meta, cpu)
        recorder.tape.add_op(ReadTensor(reader, key), (), {"device": cpu}, (), (ref,), None, None)
        return recorded_tensor(meta, cpu)
