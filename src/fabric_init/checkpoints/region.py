"""Regions of a full tensor: an n-dimensional box, or a span of the flattened tensor.

A sharded strategy keeps only a part of each tensor. :class:`Box` is what a DTensor shard is (FSDP2, tensor parallel),
:class:`Span` is what a flat shard is (ZeRO-3). ``None`` stands for the whole tensor wherever a region is asked for.

Regions come from our own placements, never from a user or a file, so a region that sticks out of its tensor is an
``AssertionError``: slicing would clip it silently and leave part of a weight unfilled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch


def is_below(limit: int, sizes: Iterable[int]) -> bool:
    """Return whether the product of ``sizes``, zeros taken for ones, is below ``limit``.

    A file may state a shape of a million sizes: this is done as soon as the limit is reached, ``math.prod`` multiplies
    ever longer numbers.
    """
    product = 1
    for size in sizes:
        product *= size or 1
        if product >= limit:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Box:
    """``tensor[offsets[0]:offsets[0]+sizes[0], ...]``; both tuples have one entry a dimension of the full tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Span:
    """Elements ``start:stop`` of the tensor flattened in row-major order; taking it returns a 1-D tensor."""

    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


Region = Box | Span


class Window(NamedTuple):
    """The place of a region in its row-major full tensor, in elements: the arguments of ``as_strided``."""

    start: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """The number of elements from the first to the last of the region."""
        if 0 in self.sizes:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))


def window(shape: tuple[int, ...], region: Region | None) -> Window:
    """Return the window of ``region`` in a contiguous tensor of ``shape``."""
    if isinstance(region, Span):
        assert 0 <= region.start <= region.stop <= math.prod(shape), f"{region} sticks out of shape {tuple(shape)}"
        return Window(region.start, (region.numel,), (1,))
    strides: list[int] = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size or 1
    strides.reverse()
    if region is None:
        return Window(0, tuple(shape), tuple(strides))
    _assert_inside(shape, region)
    start = sum(offset * stride for offset, stride in zip(region.offsets, strides, strict=True))
    return Window(start, region.sizes, tuple(strides))


def full_box(shape: tuple[int, ...]) -> Box:
    """Return all of a tensor of ``shape`` as a box."""
    return Box((0,) * len(shape), tuple(shape))


def overlap(box: Box, other: Box) -> Box | None:
    """Return the elements that two boxes of one tensor have in common; ``None`` if there are none."""
    starts = tuple(map(max, box.offsets, other.offsets))
    stops = (min(a + b, c + d) for a, b, c, d in zip(box.offsets, box.sizes, other.offsets, other.sizes, strict=True))
    sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def boxes_of(shape: tuple[int, ...], span: Span) -> Iterator[Box]:
    """Yield the span of a tensor of ``shape`` as boxes, in the span's order; each has its elements in row-major order.

    They are at most ``2 * len(shape) - 1``: the rest of a row, whole rows, the beginning of a row, in each dimension.
    """
    assert 0 <= span.start <= span.stop <= math.prod(shape), f"{span} sticks out of shape {tuple(shape)}"
    if not span.numel:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-span.start // row), span.stop // row  # the whole rows
    if first > last:  # within one row
        yield from _within(shape, last, Span(span.start - last * row, span.stop - last * row))
        return
    if span.start < first * row:
        yield from _within(shape, first - 1, Span(span.start - (first - 1) * row, row))
    if first < last:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    if last * row < span.stop:
        yield from _within(shape, last, Span(0, span.stop - last * row))


def span_of_boxes(
    shape: tuple[int, ...], span: Span, dtype: torch.dtype, box_of: Callable[[Box], torch.Tensor]
) -> torch.Tensor:
    """Return a span of a tensor of ``shape``, on the CPU, put together from the boxes that ``box_of`` returns."""
    out = torch.empty(span.numel, dtype=dtype, device="cpu")
    at = 0
    for box in boxes_of(shape, span):
        out[at : at + box.numel].view(box.sizes).copy_(box_of(box))
        at += box.numel
    return out


def _within(shape: tuple[int, ...], index: int, span: Span) -> Iterator[Box]:
    for inner in boxes_of(shape[1:], span):
        yield Box((index, *inner.offsets), (1, *inner.sizes))


def take(tensor: torch.Tensor, region: Region | None) -> torch.Tensor:
    """Return the ``region`` of ``tensor``, without a copy where the memory layout allows it.

    Where it does not (a :class:`Span` of a transposed tensor), only the rows that the span touches are copied.
    """
    if region is None:
        return tensor
    if isinstance(region, Span):
        assert 0 <= region.start <= region.stop <= tensor.numel(), f"{region} sticks out of {tuple(tensor.shape)}"
        if tensor.dim() < 2 or tensor.is_contiguous() or not region.numel:
            return tensor.reshape(-1)[region.start : region.stop]
        row = tensor[0].numel()
        first, last = region.start // row, (region.stop - 1) // row
        return tensor[first : last + 1].reshape(-1)[region.start - first * row : region.stop - first * row]
    _assert_inside(tensor.shape, region)
    for dim, (offset, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def copy_part(
    values: torch.Tensor, start: int, shape: tuple[int, ...], region: Region | None, out: torch.Tensor
) -> None:
    """Copy the elements that a region has in common with one part of a full tensor.

    Args:
        values: 1-D, contiguous: the elements ``start`` and on of the full tensor, flattened in row-major order.
        start: an element's number.
        shape: of the full tensor.
        region: the part that is kept.
        out: of the region's sizes.
    """
    if isinstance(region, Span):
        first, last = max(start, region.start), min(start + len(values), region.stop)
        if first < last:
            out[first - region.start : last - region.start].copy_(values[first - start : last - start])
    elif region is None:
        _copy_rows(values, start, Box((0,) * len(shape), tuple(shape)), tuple(shape), out)
    else:
        _assert_inside(shape, region)
        _copy_rows(values, start, region, tuple(shape), out)


def _copy_rows(values: torch.Tensor, start: int, box: Box, shape: tuple[int, ...], out: torch.Tensor) -> None:
    if not len(values) or not box.numel:
        return
    if not shape:
        out.copy_(values[0])
        return
    row = math.prod(shape[1:])
    low, high = box.offsets[0], box.offsets[0] + box.sizes[0]
    inner = Box(box.offsets[1:], box.sizes[1:])
    at = 0
    while at < len(values):
        index, skipped = divmod(start + at, row)
        count = 0 if skipped else (len(values) - at) // row
        if count:  # whole rows
            first, last = max(low, index), min(high, index + count)
            if first < last:
                rows = values[at : at + count * row].view(count, *shape[1:])[first - index : last - index]
                out[first - low : last - low].copy_(take(rows, Box((0, *inner.offsets), (last - first, *inner.sizes))))
            at += count * row
        else:  # a part of one row
            count = min(row - skipped, len(values) - at)
            if low <= index < high:
                _copy_rows(values[at : at + count], skipped, inner, shape[1:], out[index - low])
            at += count


def _assert_inside(shape: tuple[int, ...], box: Box) -> None:
    extents = zip(box.offsets, box.sizes, shape, strict=True)
    inside = all(offset >= 0 and size >= 0 and offset + size <= full for offset, size, full in extents)
    assert inside, f"{box} sticks out of shape {tuple(shape)}"
