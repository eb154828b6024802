"""Sentinel values in uninitialized memory, which show whether it has been written.

Three elements (first, middle, last) hold NaN, or for integers a value that is improbable in all three places. The NaN
has bits set that no arithmetic sets, which distinguishes a sentinel that was copied onto itself from a NaN that was
loaded. A cast makes it a plain NaN.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def _positions(shape: torch.Size) -> list[tuple[int, ...]]:
    """Return the indices of the first, middle and last element. A change of memory layout moves their values along."""
    positions = []
    for number in (0, shape.numel() // 2, shape.numel() - 1):
        index = []
        for size in reversed(shape):
            number, along = divmod(number, size)
            index.append(along)
        positions.append(tuple(reversed(index)))
    return positions


def sentinel_elements(tensor: Tensor) -> Tensor | None:
    """Return the elements where sentinels were placed; ``None`` if no value of the dtype is improbable enough."""
    if tensor.numel() == 0 or tensor.dtype == torch.bool:
        return None
    return torch.stack([tensor.detach()[index] for index in _positions(tensor.shape)])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    """Return the memory of ``tensor`` as integers of the same size; of complex numbers, their parts."""
    tensor = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.view(_INTEGERS[tensor.itemsize]) if tensor.is_floating_point() else tensor


@cache
def _sentinel_bits(dtype: torch.dtype) -> int:
    if dtype.is_floating_point:
        nan = int(_bits(torch.tensor(float("nan")).to(dtype)).item())
        odd = nan ^ 0x15 if dtype.itemsize > 1 else nan ^ 0x02
        is_nan = torch.tensor(odd, dtype=_INTEGERS[dtype.itemsize]).view(dtype).float().isnan()
        return odd if is_nan else nan  # some types of 8 bits have one NaN only
    limits = torch.iinfo(dtype)
    return limits.max - 90 if limits.min == 0 else limits.min + 90


def is_float(samples: Tensor) -> bool:
    """Return whether sentinels of the dtype of ``samples`` are NaN."""
    return samples.is_floating_point() or samples.is_complex()


def has_sentinel(samples: Tensor) -> bool:
    """Return whether any of ``samples``, which are floats, is a sentinel."""
    return bool((samples.float() if samples.is_floating_point() else samples).isnan().any())


def has_exact_sentinel(samples: Tensor) -> bool:
    """Return whether any of ``samples`` is bitwise a sentinel."""
    return bool((_bits(samples) == _sentinel_bits(_real(samples.dtype))).any())


def are_sentinels(samples: Tensor) -> bool:
    """Return whether all of ``samples`` are sentinels."""
    if is_float(samples):
        return bool((samples.float() if samples.is_floating_point() else samples).isnan().all())
    return are_exact_sentinels(samples)


def are_exact_sentinels(samples: Tensor) -> bool:
    """Return whether all of ``samples`` are bitwise sentinels, as they were placed."""
    return bool((_bits(samples) == _sentinel_bits(_real(samples.dtype))).all())


def is_partly_written(samples: Tensor, tensor: Tensor) -> bool:
    """Return whether integers that were written hold sentinels still. Short ones hold such values too often to know."""
    if samples.itemsize < 4:
        return False
    left = _bits(samples) == _sentinel_bits(samples.dtype)
    return bool(left.any()) and not bool((tensor == samples[left][0]).all())  # all of them: the value that was written


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def place_sentinels(tensor: Tensor) -> None:
    """Write sentinel values into newly allocated memory."""
    if tensor.numel() and tensor.dtype != torch.bool:
        bits = _bits(tensor)
        for index in _positions(tensor.shape):
            bits[index] = _sentinel_bits(_real(tensor.dtype))


def version_of(tensor: Tensor) -> int:
    """Return how often ``tensor`` was written in place; 0 for inference tensors, which have no counter."""
    return 0 if tensor.is_inference() else tensor._version
