"""What the elements of a tensor are like, counted in one pass over the file, a region at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from fabric_init.checkpoints.storage.local import memory
from fabric_init.tools.inspect.contents import Values
from fabric_init.tools.inspect.survey import Found, Run

_READ_BYTES = 8 << 20
"""At most so much of the file at a time in each thread."""
_COUNTED = 1 << 18
"""Elements that are widened to float64 together: they fit the cache of a core."""
_THREADS = min(4, os.cpu_count() or 1)

Report = Callable[[int], None]
"""Is told of bytes that were read."""


def count_values(found: Sequence[Found], report: Report) -> Iterator[Values | Exception]:
    """The values of each tensor, in order; or why they cannot be read.

    Takes about 16 MB in each of up to four threads, whatever the sizes of tensors.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda one: _try(one, report), found)


def _try(one: Found, report: Report) -> Values | Exception:
    try:
        return _count(one, report)
    except Exception as error:  # of a reader that somebody registered: of any kind
        return error


def _count(one: Found, report: Report) -> Values:
    digest = hashlib.blake2b(f"{one.dtype} {one.shape} {one.layout}".encode(), digest_size=16)
    moments = _ValueMoments()
    for block in _blocks(one.runs):
        digest.update(memory(block))
        moments.add(block)
        report(block.nbytes)
    return moments.values(digest.hexdigest())


def _blocks(runs: Sequence[Run]) -> Iterator[torch.Tensor]:
    for run in runs:
        start, step = 0, _COUNTED
        while start < run.numel:
            stop = min(start + step, run.numel)
            block = run.read(start, stop).contiguous()
            step = max(1, _READ_BYTES // block.element_size())
            yield block
            start = stop


class _ValueMoments:
    """Mean and squared deviations, merged block by block: Chan, Golub and LeVeque, "Updating formulae" (1979)."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._count = self._nans = self._infs = 0
        self._mean = self._squares = 0.0

    def add(self, block: torch.Tensor) -> None:
        flat = torch.view_as_real(block).reshape(-1) if block.is_complex() else block
        for start in range(0, len(flat), _COUNTED):
            self._add(flat[start : start + _COUNTED].to(torch.float64))

    def _add(self, part: torch.Tensor) -> None:
        total = float(part.sum())
        if not math.isfinite(total):
            finite = torch.isfinite(part)
            nans = int(torch.isnan(part).sum())
            self._nans += nans
            self._infs += len(part) - int(finite.sum()) - nans
            part = part[finite]
            total = float(part.sum())
        count = len(part)
        if not count:
            return
        mean = total / count
        low, high = part.aminmax()
        squares = float((part - mean).square_().sum())
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        apart = mean - self._mean
        both = self._count + count
        self._squares += squares + apart * apart * self._count * count / both
        self._mean += apart * count / both
        self._count = both

    def values(self, digest: str) -> Values:
        if not self._count:
            return Values(math.nan, math.nan, math.nan, math.nan, self._nans, self._infs, digest)
        std = math.sqrt(self._squares / self._count)
        return Values(self._low, self._high, self._mean, std, self._nans, self._infs, digest)
