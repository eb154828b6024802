"""What a region means, held against plain indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fabric_init.checkpoints import Box, Span, take
from fabric_init.checkpoints.region import Region, boxes_of, copy_part, full_box, overlap, window


@st.composite
def shaped_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    if draw(st.booleans()):
        numel = torch.Size(shape).numel()
        start = draw(st.integers(0, numel))
        return shape, Span(start, draw(st.integers(start, numel)))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return shape, Box(offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True)))


def by_indexing(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    if isinstance(region, Span):
        return tensor.flatten()[region.start : region.stop]
    return tensor[tuple(slice(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True))]


@given(shaped_regions())
def test_take_and_window_agree_with_plain_indexing(case: tuple[tuple[int, ...], Region]) -> None:
    shape, region = case
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    expected = by_indexing(tensor, region)
    assert torch.equal(take(tensor, region), expected)
    assert region.numel == expected.numel()
    start, sizes, strides = window(shape, region)
    assert torch.equal(tensor.flatten().as_strided(sizes, strides, start) if expected.numel() else expected, expected)


@given(shaped_regions())
def test_take_is_right_for_a_transposed_tensor(case: tuple[tuple[int, ...], Region]) -> None:
    shape, region = case
    transposed = (
        torch.arange(torch.Size(shape).numel()).reshape(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    )
    assert torch.equal(take(transposed, region), by_indexing(transposed, region))


@given(shaped_regions())
def test_the_boxes_of_a_span_are_that_span_in_its_order(case: tuple[tuple[int, ...], Region]) -> None:
    shape, region = case
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    span = region if isinstance(region, Span) else Span(0, tensor.numel())
    boxes = list(boxes_of(shape, span))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    parts = [by_indexing(tensor, box).flatten() for box in boxes]
    assert torch.equal(torch.cat([tensor.flatten()[:0], *parts]), by_indexing(tensor, span))


@given(shaped_regions(), st.data())
def test_the_overlap_of_two_boxes_is_what_they_have_in_common(
    case: tuple[tuple[int, ...], Region], data: st.DataObject
) -> None:
    shape, one = case
    one = one if isinstance(one, Box) else full_box(shape)
    offsets = tuple(data.draw(st.integers(0, size)) for size in shape)
    sizes = tuple(data.draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True))
    found = overlap(one, Box(offsets, sizes))
    marks = torch.zeros(shape, dtype=torch.int64)
    for box in (one, Box(offsets, sizes)):
        by_indexing(marks, box).add_(1)
    assert (found.numel if found else 0) == int((marks == 2).sum())
    assert found is None or bool((by_indexing(marks, found) == 2).all())


def test_a_box_and_a_span_of_a_contiguous_tensor_are_views() -> None:
    tensor = torch.zeros(4, 6)
    for region in (Box((1, 2), (2, 3)), Span(3, 17)):
        assert take(tensor, region).untyped_storage().data_ptr() == tensor.data_ptr()


def test_a_span_of_a_transposed_tensor_copies_only_the_rows_it_touches() -> None:
    part = take(torch.zeros(6, 1000).t(), Span(600, 612))
    assert part.untyped_storage().nbytes() == 2 * 6 * 4


@pytest.mark.parametrize("region", [Span(0, 25), Span(3, 2), Span(-1, 2), Box((0, 3), (4, 4)), Box((0,), (4,))])
def test_a_region_that_sticks_out_is_an_assertion_of_ours_and_not_clipped(region: Region) -> None:
    with pytest.raises((AssertionError, ValueError)):
        take(torch.zeros(4, 6), region)
    with pytest.raises((AssertionError, ValueError)):
        window((4, 6), region)


@given(shaped_regions(), st.integers(1, 9))
def test_a_region_is_put_together_from_parts_of_the_full_tensor(
    shaped: tuple[tuple[int, ...], Region], step: int
) -> None:
    shape, region = shaped
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    expected = by_indexing(full, region)
    out = torch.full(expected.shape, -1, dtype=torch.int64)
    for start in range(0, full.numel(), step):
        copy_part(full.flatten()[start : start + step], start, shape, region, out)
    assert torch.equal(out, expected.long())


def test_parts_go_into_memory_of_any_layout() -> None:
    full = torch.arange(24.0).view(2, 3, 2, 2)
    out = torch.empty(2, 3, 2, 2).to(memory_format=torch.channels_last)
    for start in range(0, 24, 5):
        copy_part(full.flatten()[start : start + 5], start, (2, 3, 2, 2), None, out)
    assert torch.equal(out, full)
