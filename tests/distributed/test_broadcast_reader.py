"""One reader, in a group of one rank: layouts, shared memory, and that nothing is mapped. Groups: tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fabric_init import CheckpointMismatchError, deferred_init
from fabric_init.checkpoints import Box, open_checkpoint
from fabric_init.distributed.agreement import RankGroup
from fabric_init.distributed.broadcast import BroadcastReader
from fabric_init.filling.execute import fill_model
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.plan import LoadOptions


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[64, 1 << 20], ids=["in pieces", "together"])
def budget(request: pytest.FixtureRequest) -> int:
    return request.param


def opened(path: Path, state: dict[str, Tensor], budget: int = 64) -> BroadcastReader:
    torch.save(state, path / "m.pt")
    return BroadcastReader.open(lambda: open_checkpoint(path / "m.pt", mmap=False), RankGroup(), budget)


def filled(build: type[nn.Module], reader: BroadcastReader, strict: bool = True) -> nn.Module:
    with deferred_init():
        model = build()
    fill_model(model, reader, LoadOptions(strict), WholeTensors(), agreement=RankGroup())
    return model


class Layouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.turned = nn.Parameter(torch.ones(2, 7).t())
        self.scalar = nn.Parameter(torch.ones(()))
        self.nothing = nn.Parameter(torch.ones(0, 3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_values_lie_in_memory_as_the_constructor_wants_them(budget: int, tmp_path: Path) -> None:
    eager = Layouts()
    state = {key: torch.rand(value.shape).mul(9).to(value.dtype) for key, value in eager.state_dict().items()}
    model = filled(Layouts, opened(tmp_path, state, budget))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
        assert value.stride() == eager.state_dict()[key].stride(), key


def test_a_scalar_takes_the_element_of_a_tensor_with_one_dimension(budget: int, tmp_path: Path) -> None:
    state = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in Layouts().state_dict().items()}
    model = filled(
        Layouts, opened(tmp_path, {**state, "scalar": torch.tensor([4.5]), "count": torch.tensor([3])}, budget)
    )
    assert model.scalar.shape == model.count.shape == ()
    assert (model.scalar.item(), model.count.item()) == (4.5, 3)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = torch.full((60,), 2.0)
        self.left = nn.Parameter(self.both[:30])
        self.right = nn.Parameter(self.both[30:])


def test_views_of_one_memory_stay_views(budget: int, tmp_path: Path) -> None:
    model = filled(Views, opened(tmp_path, {"right": torch.arange(30.0)}, budget), strict=False)
    assert len({t.untyped_storage().data_ptr() for t in (model.both, model.left, model.right)}) == 1
    assert torch.equal(model.both, torch.cat([torch.full((30,), 2.0), torch.arange(30.0)]))


def test_each_tensor_has_memory_of_its_own_and_no_more_than_it_needs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))

    shared = torch.arange(5.0)
    model = filled(Two, opened(tmp_path, {"one": shared[:3], "other": shared}, 1 << 20))
    assert [parameter.untyped_storage().nbytes() for parameter in model.parameters()] == [12, 20]
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(40, 1, bias=False)
        self.other = nn.Linear(40, 1, bias=False)
        self.other.weight = self.one.weight


def test_tied_tensors_are_compared_to_their_last_element(budget: int, tmp_path: Path) -> None:
    value = torch.rand(1, 40)
    assert torch.equal(
        filled(Tied, opened(tmp_path, dict.fromkeys(["one.weight", "other.weight"], value))).one.weight, value
    )
    changed = value.clone()
    changed[0, -1] += 1
    reader = opened(tmp_path, {"one.weight": value, "other.weight": changed}, budget)
    with pytest.raises(CheckpointMismatchError, match=r"one\.weight and other\.weight hold different values"):
        filled(Tied, reader)


def test_it_is_a_reader_like_any_other(tmp_path: Path) -> None:
    state = {"b": torch.arange(12).view(3, 4), "a": torch.ones(2, dtype=torch.bfloat16)}
    reader = opened(tmp_path, state)
    assert (reader.path, reader.format, reader.note) == (tmp_path / "m.pt", "torch", None)
    assert reader.keys() == ("b", "a")
    assert (reader.spec("a").shape, reader.spec("a").dtype) == ((2,), torch.bfloat16)
    assert torch.equal(reader.read("b"), state["b"])
    assert torch.equal(reader.read("b", Box((1, 2), (2, 1))), state["b"][1:, 2:3])
    for ask in (reader.spec, reader.read):
        with pytest.raises(KeyError, match="has no tensor 'c'"):
            ask("c")
