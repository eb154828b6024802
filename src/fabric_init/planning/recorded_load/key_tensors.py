"""Sources: recorded tensors whose values are those of a checkpoint key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from fabric_init._torch_internals import DisableTorchDispatch, DisableTorchFunction
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import read
from fabric_init.recording.in_block.recorder import Recorder
from fabric_init.recording.mode import RecordMode
from fabric_init.recording.tape.tape import Op, Rng, now
from fabric_init.recording.tensor.recorded_tensor import META, make_recorded_tensor


class KeyTensor:
    """A tensor of a checkpoint, as the argument of the recorded call that reads it.

    Args:
        reader: The open checkpoint.
        key: The tensor's key in it.
    """

    def __init__(self, reader: CheckpointReader, key: str) -> None:
        self.reader = reader
        self.key = key
        self.read = False
        """Whether its values were asked for while the load was recorded."""

    def __repr__(self) -> str:
        return self.key


def read_source(source: KeyTensor, *, device: torch.device) -> Tensor:
    """Return the whole tensor of ``source`` on ``device``: the recorded call that makes it."""
    source.read = True
    return read(source.reader, source.key).to(device)


def source_read_by(op: Op) -> KeyTensor | None:
    """Return the source that ``op`` reads, if it is such a call."""
    return op.args[0] if op.func is read_source else None


def source_tensor(recorder: Recorder, source: KeyTensor) -> Tensor:
    """Return a recorded tensor, meant for the CPU, that has the shape, dtype and values of a checkpoint key."""
    spec, cpu = source.reader.spec(source.key), torch.device("cpu")
    with DisableTorchFunction(), DisableTorchDispatch():
        meta = torch.empty(spec.shape, dtype=spec.dtype, device=META)
        ref = recorder.new_storage(meta, cpu)
        recorder.tape.append(Op(now(), read_source, (source,), {"device": cpu}, (), (ref,)))
        return make_recorded_tensor(meta, cpu)


class KeyTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by key, as recorded tensors without values, each made when it is asked for."""

    def __init__(self, recorder: Recorder, reader: CheckpointReader) -> None:
        self._recorder = recorder
        self._reader = reader
        self._keys = frozenset(reader.keys())
        self.made: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        if key not in self.made:
            self.made[key] = source_tensor(self._recorder, KeyTensor(self._reader, key))
        return self.made[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@contextmanager
def recorded_on_sources(rng: Rng = "per_op") -> Iterator[RecordMode]:
    """Context in which what is done with sources is recorded, and after which the default generator is as it was."""
    generator = torch.get_rng_state()
    try:
        with RecordMode(rng) as mode:
            yield mode
    finally:
        torch.set_rng_state(generator)
