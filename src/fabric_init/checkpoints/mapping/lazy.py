"""Tensors that are assembled from regions of others when they are read; only what a region needs is read.

A tensor that is one plain slice of another is a view of what its source's reader returns: nothing is copied.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch

from fabric_init.checkpoints.reader import TensorSpec
from fabric_init.checkpoints.region import Box

_READ_AT_ONCE = 1 << 20  # bytes; what is larger and freed between tensors that stay leaves holes in the heap

ReadBox = Callable[[str, Box], torch.Tensor]


class LazyTensor(Protocol):
    """One tensor that is made of those under the keys ``sources``."""

    spec: TensorSpec
    sources: tuple[str, ...]

    def read(self, read: ReadBox, box: Box) -> torch.Tensor:
        """Return the ``box`` of this tensor, in the dtype of ``spec``; ``read`` returns boxes of the sources."""
        ...


class Run(NamedTuple):
    """Indices ``start : start + size`` along one dimension of the tensor under ``key``."""

    key: str
    start: int
    size: int


class Joined:
    """Runs of tensors, one after the other along dimension ``dim``; the other dimensions are the same in all."""

    def __init__(self, spec: TensorSpec, dim: int, runs: Sequence[Run]) -> None:
        self.spec = spec
        self.sources = tuple(dict.fromkeys(run.key for run in runs))
        self._dim = dim
        self._runs = [run for run in runs if run.size]
        self._starts = list(accumulate((run.size for run in self._runs), initial=0))

    def read(self, read: ReadBox, box: Box) -> torch.Tensor:
        pieces = list(self._pieces(box)) if box.numel else []
        if len(pieces) == 1:
            return read(*pieces[0])
        out = torch.empty(box.sizes, dtype=self.spec.dtype, device="cpu")
        at = 0
        for key, part in pieces:
            size = part.sizes[self._dim]
            _copy_in(out.narrow(self._dim, at, size), read, key, part)
            at += size
        return out

    def _pieces(self, box: Box) -> Iterator[tuple[str, Box]]:
        dim = self._dim
        at, stop = box.offsets[dim], box.offsets[dim] + box.sizes[dim]
        index = bisect_right(self._starts, at) - 1
        while at < stop:
            run = self._runs[index]
            end = min(stop, self._starts[index + 1])
            start = run.start + at - self._starts[index]
            yield run.key, Box(_replaced(box.offsets, dim, start), _replaced(box.sizes, dim, end - at))
            at, index = end, index + 1


class Stacked:
    """Tensors of one shape, along a new first dimension."""

    def __init__(self, spec: TensorSpec, sources: Sequence[str]) -> None:
        self.spec = spec
        self.sources = tuple(sources)

    def read(self, read: ReadBox, box: Box) -> torch.Tensor:
        out = torch.empty(box.sizes, dtype=self.spec.dtype, device="cpu")
        inner = Box(box.offsets[1:], box.sizes[1:])
        first = box.offsets[0]
        for source, into in zip(self.sources[first : first + box.sizes[0]], out.unbind(), strict=True):
            _copy_in(into, read, source, inner)
        return out


class Unstacked:
    """One index along a tensor's first dimension."""

    def __init__(self, spec: TensorSpec, source: str, index: int) -> None:
        self.spec = spec
        self.sources: tuple[str, ...] = (source,)
        self._index = index

    def read(self, read: ReadBox, box: Box) -> torch.Tensor:
        return read(self.sources[0], Box((self._index, *box.offsets), (1, *box.sizes))).squeeze(0)


class Transposed:
    """A tensor with its last two dimensions swapped."""

    def __init__(self, spec: TensorSpec, source: str) -> None:
        self.spec = spec
        self.sources: tuple[str, ...] = (source,)

    def read(self, read: ReadBox, box: Box) -> torch.Tensor:
        return read(self.sources[0], Box(swapped(box.offsets), swapped(box.sizes))).transpose(-1, -2)


def swapped(numbers: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers with the last two swapped."""
    *others, last, final = numbers
    return (*others, final, last)


def _copy_in(out: torch.Tensor, read: ReadBox, key: str, box: Box) -> None:
    """Fill ``out`` with a box of a source, some rows at a time."""
    if out.nbytes <= _READ_AT_ONCE:
        out.copy_(read(key, box))
        return
    rows = max(1, _READ_AT_ONCE // out[0].nbytes)
    for first in range(0, len(out), rows):
        some = out[first : first + rows]
        offsets, sizes = _replaced(box.offsets, 0, box.offsets[0] + first), _replaced(box.sizes, 0, len(some))
        some.copy_(read(key, Box(offsets, sizes)))


def _replaced(numbers: tuple[int, ...], index: int, number: int) -> tuple[int, ...]:
    return (*numbers[:index], number, *numbers[index + 1 :])
