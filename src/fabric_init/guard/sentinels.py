"""Marks in memory without values: as long as they lie there, nobody has filled it.

Three elements (first, middle, last) hold NaN, or for integers a value that is improbable in all three places. The NaN
has bits set that no arithmetic sets: so a mark that was copied onto itself is told from a NaN that was loaded. A cast
makes it a plain NaN.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def _positions(shape: torch.Size) -> list[tuple[int, ...]]:
    """The first, middle and last element, by index: a change of memory layout moves their values along."""
    found = []
    for number in (0, shape.numel() // 2, shape.numel() - 1):
        index = []
        for size in reversed(shape):
            number, along = divmod(number, size)
            index.append(along)
        found.append(tuple(reversed(index)))
    return found


def marked_elements(tensor: Tensor) -> Tensor | None:
    """Where marks were placed; ``None`` where no value is improbable enough to tell marks from data."""
    if tensor.numel() == 0 or tensor.dtype == torch.bool:
        return None
    return torch.stack([tensor.detach()[index] for index in _positions(tensor.shape)])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """The memory of ``tensor`` as integers of the same size; of complex numbers, their parts."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.view(_INTEGERS[tensor.itemsize]) if tensor.is_floating_point() else tensor


@cache
def _mark_bits(dtype: torch.dtype) -> int:
    if dtype.is_floating_point:
        nan = int(_bits(torch.tensor(float("nan")).to(dtype)).item())
        odd = nan ^ 0x15 if dtype.itemsize > 1 else nan ^ 0x02
        is_nan = torch.tensor(odd, dtype=_INTEGERS[dtype.itemsize]).view(dtype).float().isnan()
        return odd if is_nan else nan  # some types of 8 bits have one NaN only
    limits = torch.iinfo(dtype)
    return limits.max - 90 if limits.min == 0 else limits.min + 90


def is_float(samples: Tensor) -> bool:
    """Whether marks in ``samples`` are NaN."""
    return samples.is_floating_point() or samples.is_complex()


def has_mark(samples: Tensor) -> bool:
    """Whether any of ``samples``, which are floats, is a mark."""
    return bool((samples.float() if samples.is_floating_point() else samples).isnan().any())


def has_exact_mark(samples: Tensor) -> bool:
    """Whether any of ``samples`` is a mark to the bit."""
    return bool((_bits(samples) == _mark_bits(_real(samples.dtype))).any())


def is_mark(samples: Tensor) -> bool:
    """Whether all of ``samples`` are marks."""
    if is_float(samples):
        return bool((samples.float() if samples.is_floating_point() else samples).isnan().all())
    return is_exact_mark(samples)


def is_exact_mark(samples: Tensor) -> bool:
    """Whether all of ``samples`` are marks to the bit, as they were placed."""
    return bool((_bits(samples) == _mark_bits(_real(samples.dtype))).all())


def is_written_in_part(samples: Tensor, tensor: Tensor) -> bool:
    """Whether of integers that were written marks are left; of short ones too many values are marks to tell."""
    if samples.itemsize < 4:
        return False
    left = _bits(samples) == _mark_bits(samples.dtype)
    return bool(left.any()) and not bool((tensor == samples[left][0]).all())  # all of them: the value that was written


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def place_mark(tensor: Tensor) -> None:
    """Put marks into fresh memory."""
    if tensor.numel() and tensor.dtype != torch.bool:
        bits = _bits(tensor)
        for index in _positions(tensor.shape):
            bits[index] = _mark_bits(_real(tensor.dtype))


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
