"""Tensors of more than one chunk: each chunk by itself has the values that it has in the whole tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fabric_init.recording.mode import recorded_build
from fabric_init.recording.replay.chunks import CHUNK, chunks, chunks_of
from fabric_init.recording.replay.replay import replay_with, view
from fabric_init.recording.tape.seeds import derived_seed
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import meta_of, recorded
from fabric_init.recording.tensor.storage_tags import ref_of

SHAPE = (2 * CHUNK // 512 + 3, 512)  # three chunks, the last of them short
ROWS = SHAPE[0]

MADE_IN_CHUNKS: dict[str, Callable[[], Tensor]] = {
    "normal_": lambda: nn.init.normal_(torch.empty(SHAPE), std=0.02),
    "uniform_ with keywords alone": lambda: nn.init.uniform_(tensor=torch.empty(SHAPE), a=-1.0, b=2.0),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(SHAPE), std=0.02),
    "kaiming_uniform_": lambda: nn.init.kaiming_uniform_(torch.empty(SHAPE), a=5**0.5),
    "kaiming_normal_ of the fan out": lambda: nn.init.kaiming_normal_(torch.empty(SHAPE), mode="fan_out"),
    "xavier_uniform_": lambda: nn.init.xavier_uniform_(torch.empty(SHAPE), gain=2.0),
    "xavier_normal_": lambda: nn.init.xavier_normal_(torch.empty(SHAPE)),
    "the method normal_": lambda: torch.empty(SHAPE).normal_(1.0, 3.0),
    "exponential_": lambda: torch.empty(SHAPE).exponential_(2.0),
    "bernoulli_": lambda: torch.empty(SHAPE).bernoulli_(0.3),
    "random_": lambda: torch.empty(SHAPE, dtype=torch.int64).random_(5, 99),
    "randn, scaled and moved": lambda: torch.randn(SHAPE) * 0.02 + 1,
    "rand, in place": lambda: torch.rand(SHAPE).mul_(2).sub_(1),
    "two draws, added": lambda: torch.randn(SHAPE) + torch.rand(SHAPE),
    "zeros, in part": lambda: _zeros_in_part(),
    "ones": lambda: torch.ones(SHAPE),
    "constant_": lambda: nn.init.constant_(torch.empty(SHAPE), 3.0),
    "a cast": lambda: torch.randn(SHAPE).bfloat16(),
    "a draw in bfloat16": lambda: torch.empty(SHAPE, dtype=torch.bfloat16).normal_(),
    "a padding row": lambda: nn.Embedding(*SHAPE, padding_idx=ROWS // 2).weight.detach(),
    "rows that are written once more": lambda: _rows_written(),
    "clamped": lambda: torch.randn(SHAPE).clamp_(-0.5, 0.5),
}

COMPUTED_WHOLE: dict[str, Callable[[], Tensor]] = {
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(SHAPE[0], 512)),
    "exp, which is approximated": lambda: torch.randn(SHAPE).exp_(),
    "a column": lambda: _column_written(),
    "a row of draws": lambda: _row_drawn(),
    "divided by its largest element": lambda: (lambda t: t / t.abs().max())(torch.randn(SHAPE)),
    "broadcast": lambda: torch.randn(SHAPE) * torch.randn(512),
    "transposed, then drawn": lambda: torch.empty(SHAPE[::-1]).t().normal_().contiguous(),
    "a generator of its own": lambda: torch.empty(SHAPE).normal_(generator=torch.Generator().manual_seed(3)),
    "zeros": lambda: torch.zeros(SHAPE),
    "cumsum": lambda: torch.ones(SHAPE).cumsum(0),
    "one chunk": lambda: torch.randn(CHUNK),
}


def _rows_written() -> Tensor:
    tensor = torch.randn(SHAPE)
    tensor[5:300] = 1.0
    tensor[2].zero_()
    return tensor


def _zeros_in_part() -> Tensor:
    tensor = torch.zeros(SHAPE)
    tensor[7:300].fill_(2.0)
    return tensor


def _column_written() -> Tensor:
    tensor = torch.randn(SHAPE)
    tensor[:, 3] = 1.0
    return tensor


def _row_drawn() -> Tensor:
    tensor = torch.zeros(SHAPE)
    tensor[3].normal_()
    return tensor


def _recorded(make: Callable[[], Tensor]) -> tuple[Tape, TensorRef]:
    torch.manual_seed(7)
    with recorded_build() as tape:
        tensor = make()
    tag = recorded(tensor)
    assert tag is not None
    return tape, ref_of(meta_of(tensor), tag.storage)


def _whole(tape: Tape, ref: TensorRef) -> Tensor:
    return view(replay_with(tape, [ref.storage], {}, exact=False)[ref.storage], ref)


def _by_chunks(tape: Tape, ref: TensorRef) -> Tensor:
    found = chunks(tape, ref, exact=False)
    assert found is not None
    out = torch.empty(ref.size.numel(), dtype=ref.dtype)
    for start, stop in reversed(list(chunks_of(len(out)))):  # in another order: no chunk depends on another
        found.compute(start, out[start:stop])
    return out.view(ref.size)


@pytest.mark.parametrize("make", MADE_IN_CHUNKS.values(), ids=MADE_IN_CHUNKS.keys())
def test_chunks_have_the_values_of_the_whole_tensor(make: Callable[[], Tensor]) -> None:
    tape, ref = _recorded(make)
    assert torch.equal(_by_chunks(tape, ref), _whole(tape, ref))


@pytest.mark.parametrize("make", COMPUTED_WHOLE.values(), ids=COMPUTED_WHOLE.keys())
def test_what_depends_on_more_than_one_chunk_is_computed_whole(make: Callable[[], Tensor]) -> None:
    tape, ref = _recorded(make)
    assert chunks(tape, ref, exact=False) is None


def test_draws_in_order_are_not_made_in_chunks() -> None:
    tape, ref = _recorded(lambda: torch.randn(SHAPE))
    assert chunks(tape, ref, exact=True) is None


def test_a_stream_that_the_constructor_has_seeded_is_drawn_as_plain_pytorch_draws_it() -> None:
    def seeded() -> Tensor:
        torch.manual_seed(11)
        return torch.randn(SHAPE)

    tape, ref = _recorded(seeded)
    assert chunks(tape, ref, exact=False) is None
    assert torch.equal(_whole(tape, ref), seeded())


def test_chunks_of_one_draw_are_not_alike() -> None:
    values = _whole(*_recorded(lambda: torch.randn(SHAPE))).view(-1)
    assert not torch.equal(values[:1000], values[CHUNK : CHUNK + 1000])


def test_a_tensor_of_one_chunk_is_drawn_as_one_op() -> None:
    tape, ref = _recorded(lambda: torch.randn(CHUNK))
    (op,) = tape.ops.values()
    assert op.draw is not None
    seed = derived_seed(tape.streams[op.draw.stream].seed, op.draw.position)
    assert torch.equal(_whole(tape, ref), torch.randn(CHUNK, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", ["normal_", "kaiming_uniform_", "trunc_normal_", "exponential_"])
def test_the_distribution_is_that_of_plain_pytorch(name: str) -> None:
    """By its quantiles, which a chunk that is drawn twice or with other bounds would move."""
    make = MADE_IN_CHUNKS[name]
    at = torch.linspace(0.01, 0.99, 25)
    ours, plain = _whole(*_recorded(make)).view(-1), make().view(-1)
    assert torch.allclose(ours.quantile(at), plain.quantile(at), atol=float(plain.std()) * 0.05)
