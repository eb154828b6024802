"""Count and measure the elements of tensors in one pass over the file, a block at a time."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from fabric_init.checkpoints.storage.strided_window import memory
from fabric_init.reports.statistics import RunningMoments
from fabric_init.tools.inspect.contents import Values
from fabric_init.tools.inspect.survey import ElementRun, SurveyedTensor

_READ_BYTES = 8 << 20
"""The most that each thread reads of the file at once."""
_COUNTED = 1 << 18
"""Elements that are cast to float64 together; they fit the cache of a core."""
_THREADS = min(4, os.cpu_count() or 1)

Report = Callable[[int], None]
"""Called with the number of bytes that were read."""


def count_values(tensors: Sequence[SurveyedTensor], report: Report) -> Iterator[Values | Exception]:
    """Yield the values of each tensor in order, or the error that reading it raised.

    Needs about 16 MB in each of up to four threads, regardless of tensor sizes.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda tensor: _try(tensor, report), tensors)


def _try(tensor: SurveyedTensor, report: Report) -> Values | Exception:
    try:
        return _measure(tensor, report)
    except Exception as error:  # a registered reader may raise anything
        return error


def _measure(tensor: SurveyedTensor, report: Report) -> Values:
    digest = hashlib.blake2b(f"{tensor.dtype} {tensor.shape} {tensor.layout}".encode(), digest_size=16)
    counter = _ValueCounter()
    for block in _blocks(tensor.runs):
        digest.update(memory(block))
        counter.add(block)
        report(block.nbytes)
    return counter.values(digest.hexdigest())


def _blocks(runs: Sequence[ElementRun]) -> Iterator[torch.Tensor]:
    for run in runs:
        start, step = 0, _COUNTED
        while start < run.numel:
            stop = min(start + step, run.numel)
            block = run.read(start, stop).contiguous()
            step = max(1, _READ_BYTES // block.element_size())
            yield block
            start = stop


class _ValueCounter:
    """Minimum, maximum and moments of the finite elements, and the number of the others."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._nans = self._infs = 0
        self._moments = RunningMoments()

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
        if not len(part):
            return
        mean = total / len(part)
        low, high = part.aminmax()
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        self._moments.merge(len(part), mean, float((part - mean).square_().sum()) / len(part))

    def values(self, digest: str) -> Values:
        moments = self._moments
        if not moments.count:
            return Values(math.nan, math.nan, math.nan, math.nan, self._nans, self._infs, digest)
        return Values(self._low, self._high, moments.mean, moments.std, self._nans, self._infs, digest)
