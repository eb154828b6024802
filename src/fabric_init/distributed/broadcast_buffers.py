"""Split a sequence of tensors into batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fabric_init.checkpoints import Span, TensorSpec

ALIGNMENT = 16  # bytes; that of the widest dtype


class Piece(NamedTuple):
    """Elements ``start:stop`` of the flattened tensor number ``tensor``, at byte ``offset`` of the buffer."""

    tensor: int
    start: int
    stop: int
    offset: int
    dtype: torch.dtype
    is_last: bool

    @property
    def end(self) -> int:
        """The byte of the buffer at which it ends, exclusive."""
        return self.offset + (self.stop - self.start) * self.dtype.itemsize


def batches(specs: Sequence[TensorSpec], capacity: int) -> Iterator[list[Piece]]:
    """Yield all elements of all tensors, in order, in batches of at most ``capacity`` bytes; empty tensors, too.

    ``capacity`` is a multiple of :data:`ALIGNMENT`, as every piece's offset is.
    """
    assert capacity % ALIGNMENT == 0
    batch: list[Piece] = []
    used = 0
    for tensor, spec in enumerate(specs):
        start, numel, size = 0, spec.shape.numel(), spec.dtype.itemsize
        while True:
            stop = min(numel, start + (capacity - used) // size)
            if stop > start or not numel:
                batch.append(Piece(tensor, start, stop, used, spec.dtype, stop == numel))
                used = aligned(batch[-1].end)
            if stop == numel:
                break
            yield batch
            batch, used, start = [], 0, stop
    if batch:
        yield batch


def aligned(size: int) -> int:
    """Return the number of bytes that ``size`` bytes take in a batch."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def chunks(piece: Piece, size: int) -> Iterator[Span]:
    """Yield the elements of a piece in runs of at most ``size`` bytes."""
    step = size // piece.dtype.itemsize
    for start in range(piece.start, piece.stop, step):
        yield Span(start, min(piece.stop, start + step))
