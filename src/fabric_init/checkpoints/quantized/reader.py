"""A checkpoint of quantized weights as one of plain weights, which are dequantized when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fabric_init.checkpoints.quantized.weights import Quantized
from fabric_init.checkpoints.reader import BaseReader, CheckpointReader, fields_of, is_collective, metadata_of, read
from fabric_init.checkpoints.region import Box, Region, Span, full_box, span_of_boxes

_AT_ONCE = 1 << 21  # elements; what dequantizing takes beside its result stays small


class DequantizedReader(BaseReader):
    """A :class:`~fabric_init.checkpoints.reader.CheckpointReader`; of a weight, it reads only what a region needs.

    Args:
        below: The checkpoint.
        weights: Its quantized weights, by the key that each has as a plain one.
    """

    below: CheckpointReader

    def __init__(self, below: CheckpointReader, weights: Mapping[str, Quantized]) -> None:
        self.path, self.format, self.note, self.extra_state = below.path, below.format, below.note, below.extra_state
        self.metadata, self.fields, self.collective = metadata_of(below), fields_of(below), is_collective(below)
        self.below = below
        self.weights = weights
        gone = {key: weight for weight in weights.values() for key in weight.sources}
        specs = {}
        for key in below.keys():
            weight = gone.get(key)
            specs.update({key: below.spec(key)} if weight is None else {weight.key: weight.spec})
        self.specs = specs

    def sources(self, key: str) -> Sequence[str]:
        weight = self.weights.get(key)
        return (key,) if weight is None else weight.sources

    def read(self, key: str, region: Region | None = None) -> Tensor:
        """Return the tensor, or a region of it, on the CPU."""
        spec, weight = self.spec(key), self.weights.get(key)
        if weight is None:
            return read(self.below, key, region)
        if isinstance(region, Span):
            return span_of_boxes(spec.shape, region, spec.dtype, lambda box: self._box(weight, box))
        return self._box(weight, region or full_box(spec.shape))

    def _box(self, weight: Quantized, box: Box) -> Tensor:
        out = torch.empty(box.sizes, dtype=weight.spec.dtype, device="cpu")
        if not box.numel or not box.sizes:
            return weight.values(lambda key, where: read(self.below, key, where), box) if box.numel else out
        rows = max(1, _AT_ONCE * box.sizes[0] // box.numel)
        for first in range(0, box.sizes[0], rows):
            some = min(rows, box.sizes[0] - first)
            part = Box((box.offsets[0] + first, *box.offsets[1:]), (some, *box.sizes[1:]))
            out[first : first + some] = weight.values(lambda key, where: read(self.below, key, where), part)
        return out
