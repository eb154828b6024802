"""Sources: recorded tensors whose values are those of a checkpoint key."""

from __future__ import annotations

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import read
from fabric_init.recording.recorder import Recorder
from fabric_init.recording.tape import Op
from fabric_init.recording.tensor import META, recorded_tensor


class Source:
    """A tensor of a checkpoint, as the argument of the recorded call that reads it.

    Args:
        reader: The open checkpoint.
        key: The tensor's key in it.
    """

    def __init__(self, reader: CheckpointReader, key: str) -> None:
        self.reader = reader
        self.key = key

    def __repr__(self) -> str:
        return self.key


def read_source(source: Source, *, device: torch.device) -> Tensor:
    """Return the whole tensor of ``source`` on ``device``: the recorded call that makes it."""
    return read(source.reader, source.key).to(device)


def source_read_by(op: Op) -> Source | None:
    """Return the source that ``op`` reads, if it is such a call."""
    return op.args[0] if op.func is read_source else None


def source_tensor(recorder: Recorder, reader: CheckpointReader, key: str) -> Tensor:
    """Return a recorded tensor, meant for the CPU, that has the shape, dtype and values of a checkpoint key."""
    spec, cpu = reader.spec(key), torch.device("cpu")
    with DisableTorchFunction(), DisableTorchDispatch():
        meta = torch.empty(spec.shape, dtype=spec.dtype, device=META)
        ref = recorder.new_storage(meta, cpu)
        recorder.tape.add_op(read_source, (Source(reader, key),), {"device": cpu}, (), (ref,), None, None)
        return recorded_tensor(meta, cpu)
