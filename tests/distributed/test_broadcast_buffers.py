"""Batches: every element of every tensor once, in order, and never more bytes than there is room for."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fabric_init.checkpoints import TensorSpec
from fabric_init.distributed.broadcast_buffers import ALIGNMENT, batches, chunks

DTYPES = [torch.bool, torch.bfloat16, torch.float32, torch.complex128]
specs_of_all_kinds = st.lists(
    st.builds(TensorSpec, st.lists(st.integers(0, 5), max_size=3).map(torch.Size), st.sampled_from(DTYPES)),
    max_size=12,
)
rooms = st.integers(1, 20).map(lambda count: count * ALIGNMENT)


@given(specs_of_all_kinds, rooms)
def test_each_element_is_in_one_batch_and_batches_fit(specs: list[TensorSpec], room: int) -> None:
    seen: list[tuple[int, int]] = []
    for batch in batches(specs, room):
        end = 0
        for piece in batch:
            assert piece.offset >= end
            assert piece.offset % ALIGNMENT == 0, "a view of it in its dtype is possible"
            end = piece.end
            seen += ((piece.tensor, element) for element in range(piece.start, piece.stop))
            assert piece.dtype == specs[piece.tensor].dtype
        assert end <= room
    assert seen == [(index, element) for index, spec in enumerate(specs) for element in range(spec.shape.numel())]


@given(specs_of_all_kinds, rooms)
def test_each_tensor_ends_once_also_one_without_elements(specs: list[TensorSpec], room: int) -> None:
    last = [piece.tensor for batch in batches(specs, room) for piece in batch if piece.is_last]
    assert last == list(range(len(specs)))


def test_small_tensors_go_together_and_a_large_one_in_pieces() -> None:
    specs = [TensorSpec(torch.Size([count]), torch.float32) for count in (4, 4, 100)]
    found = [[(piece.tensor, piece.start, piece.stop) for piece in batch] for batch in batches(specs, 256)]
    assert found == [[(0, 0, 4), (1, 0, 4), (2, 0, 56)], [(2, 56, 100)]]


def test_chunks_cover_a_piece() -> None:
    [[piece]] = batches([TensorSpec(torch.Size([10]), torch.int64)], 80)
    assert [(span.start, span.stop) for span in chunks(piece, 32)] == [(0, 4), (4, 8), (8, 10)]
