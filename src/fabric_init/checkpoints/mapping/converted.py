"""A checkpoint after declared conversions; regions of its tensors can still be read alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from fabric_init.checkpoints.mapping.convert import Conversion
from fabric_init.checkpoints.mapping.lazy import LazyTensor
from fabric_init.checkpoints.reader import BaseReader, CheckpointReader, TensorSpec, is_collective, metadata_of
from fabric_init.checkpoints.region import Region, Span, full_box, span_of_boxes
from fabric_init.errors import CheckpointMismatchError


def converted(reader: CheckpointReader, conversions: Sequence[Conversion]) -> CheckpointReader:
    """Apply ``conversions`` to ``reader``, one after the other. Only headers are read.

    Raises:
        CheckpointMismatchError: the checkpoint is not as declared, or two of its tensors would get one key.
        TypeError: ``conversions`` is no list of conversions.
    """
    if not isinstance(conversions, Sequence):
        raise TypeError(f"convert must be a list of conversions, such as [Split(…), …], got {conversions!r}")
    for conversion in conversions:
        if isinstance(conversion, type) or not callable(getattr(conversion, "made", None)):
            raise TypeError(f"convert must be a list of conversions (Split, Fuse, …), got {conversion!r}")
        reader = ConvertedReader(reader, conversion)
    return reader


class ConvertedReader(BaseReader):
    """``below`` after one conversion; a :class:`~fabric_init.checkpoints.reader.CheckpointReader`."""

    def __init__(self, below: CheckpointReader, conversion: Conversion) -> None:
        self.path, self.format = below.path, below.format
        self._below = below
        specs = {key: below.spec(key) for key in below.keys()}
        try:
            self._made = conversion.made(specs)
            keys = _keys_after(specs, self._made)
        except CheckpointMismatchError as error:
            raise CheckpointMismatchError(f"{below.path}: {conversion}: {error}.") from None
        self.specs = {key: self._made[key].spec if key in self._made else specs[key] for key in keys}
        self.extra_state, self.metadata = below.extra_state, metadata_of(below)  # conversions are of tensors
        self.collective = is_collective(below)
        self.note = "; ".join(filter(None, [below.note, f"{conversion}: {len(self._made)} tensors made"]))

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """Return the tensor, or a region of it; of its sources, only what the region needs is read."""
        made = self._made.get(key)
        if made is None:
            self.spec(key)
            return self._below.read(key, region)
        if not isinstance(region, Span):
            return made.read(self._below.read, region or full_box(made.spec.shape))
        read = self._below.read
        return span_of_boxes(made.spec.shape, region, made.spec.dtype, lambda box: made.read(read, box))


def _keys_after(specs: Mapping[str, TensorSpec], made: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    used = {source for tensor in made.values() for source in tensor.sources}
    first: defaultdict[str, list[str]] = defaultdict(list)
    for key, tensor in made.items():
        if key in specs and key not in used:
            raise CheckpointMismatchError(f"it makes {key}, and the checkpoint has a tensor of that name already")
        first[tensor.sources[0]].append(key)
    return tuple(name for key in specs for name in (first[key] if key in used else (key,)))
