"""A checkpoint in which some tensors are computed from those of another one, by what a tape has recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fabric_init._text import joined
from fabric_init.checkpoints import BaseReader, CheckpointReader, Region, TensorSpec
from fabric_init.checkpoints.reader import fields_of, is_collective, metadata_of
from fabric_init.planning.recorded_load.regions import Evaluation
from fabric_init.recording.tape.tape import Tape, TensorRef

_MOST_SOURCES = 3


class Value(NamedTuple):
    """A tensor on the tape."""

    ref: TensorRef
    sources: Sequence[str]
    """The keys of the other checkpoint that it is computed from."""


class ComputedReader(BaseReader):
    """A :class:`~fabric_init.checkpoints.reader.CheckpointReader`; of sources, it reads only what a region needs.

    Args:
        below: The other checkpoint.
        tape: The tape.
        values: What is computed, by its key.
        keys: All keys, in their order; what is not computed has the key that it has in ``below``.
    """

    below: CheckpointReader

    def __init__(self, below: CheckpointReader, tape: Tape, values: Mapping[str, Value], keys: Iterable[str]) -> None:
        self.path, self.format, self.note, self.extra_state = below.path, below.format, below.note, below.extra_state
        self.metadata, self.fields, self.collective = metadata_of(below), fields_of(below), is_collective(below)
        self.below = below
        self._evaluation = Evaluation(tape, whole=self.collective)
        self._values = values
        self.specs = {key: self._made(values[key]) if key in values else below.spec(key) for key in keys}

    def _made(self, value: Value) -> TensorSpec:
        sources = [f"{key} {tuple(self.below.spec(key).shape)}" for key in value.sources]
        made = f"made of {joined(sources, _MOST_SOURCES)}" if sources else "made of what the model has"
        return TensorSpec(value.ref.size, value.ref.dtype, made)

    def sources(self, key: str) -> Sequence[str]:
        value = self._values.get(key)
        return (key,) if value is None else value.sources

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """Return the tensor, or a region of it."""
        value = self._values.get(key)
        if value is None:
            self.spec(key)
            return self.below.read(key, region)
        return self._evaluation.region(value.ref, region)
