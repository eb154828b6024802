"""Marks in memory without values: as long as they lie there, nobody has filled it.

Three elements (first, middle, last) hold NaN, or for integers a value that is improbable in all three places.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _positions(shape: torch.Size) -> list[tuple[int, ...]]:
    """The first, middle and last element, by index: a change of memory layout moves their values along."""
    count = shape.numel()
    return [tuple(int(i) for i in torch.unravel_index(torch.tensor(n), shape)) for n in (0, count // 2, count - 1)]


def marked_elements(tensor: Tensor) -> Tensor | None:
    """Where marks were placed; ``None`` where no value is improbable enough to tell marks from data."""
    if tensor.numel() == 0 or tensor.dtype == torch.bool:
        return None
    return torch.stack([tensor.detach()[index] for index in _positions(tensor.shape)])


def _mark_value(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    limits = torch.iinfo(dtype)
    return limits.max - 90 if limits.min == 0 else limits.min + 90


def is_float(samples: Tensor) -> bool:
    """Whether marks in ``samples`` are NaN."""
    return samples.is_floating_point() or samples.is_complex()


def has_mark(samples: Tensor) -> bool:
    """Whether any of ``samples``, which are floats, is a mark."""
    return bool((samples.float() if samples.is_floating_point() else samples).isnan().any())


def is_mark(samples: Tensor) -> bool:
    """Whether all of ``samples`` are marks."""
    if samples.is_floating_point() or samples.is_complex():
        return bool((samples.float() if samples.is_floating_point() else samples).isnan().all())
    return bool((samples == _mark_value(samples.dtype)).all())


def place_mark(tensor: Tensor) -> None:
    """Put marks into fresh memory."""
    if tensor.numel() and tensor.dtype != torch.bool:
        for index in _positions(tensor.shape):
            tensor[index] = _mark_value(tensor.dtype)


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was written in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
