"""Large tensors are computed by their chunks, and each rank computes what it keeps of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fabric_init import deferred_init, materialize
from fabric_init.checkpoints import Box, Region, Span
from fabric_init.checkpoints.region import take
from fabric_init.filling.execute import prepare
from fabric_init.filling.values import in_chunks
from fabric_init.filling.values.in_chunks import computed_in_chunks, parts_in_chunks
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.plan import LoadOptions, storage_groups
from fabric_init.planning.tensors import TensorInfo
from fabric_init.recording.replay.chunks import CHUNK, Chunks
from tests.support.regions import regions

SHAPE = (2 * CHUNK // 64 + 5, 64)  # three chunks


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(*SHAPE, padding_idx=3)
        self.cast = nn.Parameter((torch.randn(SHAPE) * 0.02).bfloat16())
        self.small = nn.Linear(4, 4)


class Keeping(WholeTensors):
    """A placement that keeps one region of every large tensor."""

    def __init__(self, kept: Region | None) -> None:
        super().__init__()
        self._kept = kept

    def region(self, slot: TensorInfo) -> Region | None:
        return self._kept if tuple(slot.shape) == SHAPE else None


def recorded() -> Embedding:
    torch.manual_seed(1)
    with deferred_init():
        return Embedding()


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    """The model's values, each tensor computed at once."""
    model = recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_chunks, "chunks", lambda *_, **__: None)
        materialize(model)
    return model.state_dict()


@settings(max_examples=40, deadline=None)
@given(kept=st.one_of(regions(SHAPE), st.just(Box((0, 0), (SHAPE[0] // 2, 64))), st.just(Span(CHUNK, 2 * CHUNK))))
def test_any_part_has_the_values_of_the_whole_tensor(whole: dict[str, torch.Tensor], kept: Region | None) -> None:
    prepared = prepare(recorded(), None, LoadOptions())
    entries = prepared.plan.entries
    parts = parts_in_chunks(entries, storage_groups(entries), prepared.tapes, Keeping(kept), exact=False)
    values = dict(computed_in_chunks(parts.values()))
    assert {entries[at].slot.name for at in values} == {"embedding.weight", "cast"}
    for at, value in values.items():
        assert torch.equal(value, take(whole[entries[at].slot.name], kept))
        assert value.untyped_storage().nbytes() == value.nbytes


def test_a_model_that_is_filled_in_chunks_has_the_values_of_the_whole_tensors(whole: dict[str, torch.Tensor]) -> None:
    model = recorded()
    materialize(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_a_rank_computes_the_chunks_of_its_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = Chunks.compute

    def noted(self: Chunks, start: int, out: torch.Tensor) -> None:
        computed.append(start)
        compute(self, start, out)

    monkeypatch.setattr(Chunks, "compute", noted)
    prepared = prepare(recorded(), None, LoadOptions())
    entries = [entry for entry in prepared.plan.entries if entry.slot.name == "embedding.weight"]
    keeping = Keeping(Span(CHUNK + 5, CHUNK + 7))
    parts = parts_in_chunks(entries, storage_groups(entries), prepared.tapes, keeping, exact=False)
    ((_, value),) = computed_in_chunks(parts.values())
    assert value.shape == (2,)
    assert computed == [CHUNK]


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Chunks, start: int, out: torch.Tensor) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Chunks, "compute", failing)
    model = recorded()
    with pytest.raises(MemoryError, match="no more"):
        materialize(model)
    monkeypatch.undo()
    materialize(model)  # nothing has changed
