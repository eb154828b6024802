"""A model that is sharded in its block is what one is that was sharded after it, also if it is initialized in between.

Every way to shard, on simulated ranks as in ``test_every_way.py``. The init is code in the style of torchtitan's
``init_weights``: ``torch.nn.init`` functions, methods and slices, on DTensors.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import init
from torch.testing._internal.distributed.fake_pg import FakeStore

from fabric_init import RecordingError, UninitializedTensorError, deferred_init, materialize
from tests.sharding.test_every_way import alike
from tests.sharding.ways import (
    WAYS,
    Model,
    Way,
    block_by_block,
    fully_shard_on,
    local_part,
    one_dimension,
    options,
    recorded_model,
)
from tests.support.ranks import run_ranks

WORLDS, WHOLE = (2,), (1, 2, 3, 8)
"""How many ranks there are, without and with ``--whole``."""
SAMPLE = 3
"""Without, one of so many ways is taken where models are not initialized in the block of their sharding."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize("world", WHOLE if whole else WORLDS)
        metafunc.parametrize(("how", "step"), [(how, 1 if whole or how == MAIN else SAMPLE) for how in BUILDS])


def init_weights(model: nn.Module) -> None:
    for number, block in enumerate(model.blocks):
        init.trunc_normal_(block.up.weight, std=0.02)
        init.zeros_(block.up.bias)
        init.xavier_uniform_(block.down.weight)
        block.down.bias.data.uniform_()
        block.norm.reset_parameters()
        with torch.no_grad():
            block.norm.weight.mul_(0.5 + number).add_(torch.rand(()))
    init.normal_(model.embedding.weight, std=0.5)
    with torch.no_grad():
        model.embedding.weight[1].fill_(0)
        model.head.weight.copy_(model.embedding.weight)
        model.head.weight *= 2
    model.embedding.weight.data[2].zero_()
    if model.head.weight.dtype == torch.float32:
        init.orthogonal_(model.head.weight)


def sharded_in_the_block(way: Way, world: int) -> nn.Module:
    with deferred_init():
        model = way.model()
        way.shard(model, world, way.source)
    return model


def initialized_in_the_block(way: Way, world: int) -> nn.Module:
    with deferred_init():
        model = way.model()
        way.shard(model, world, way.source)
        init_weights(model)
    return model


def initialized_in_a_second_block(way: Way, world: int) -> nn.Module:
    with deferred_init():
        model = way.model()
    way.shard(model, world, way.source)
    with deferred_init():
        init_weights(model)
    return model


Build = Callable[[Way, int], nn.Module]
BUILDS: dict[str, tuple[Build, Callable[[nn.Module], None], int]] = {
    "sharded in the block": (sharded_in_the_block, lambda model: None, 1),
    "initialized in the block": (initialized_in_the_block, init_weights, 1),
    "initialized in a second block": (initialized_in_a_second_block, init_weights, 2),
}
"""How the model is built, and the whole one that it is compared with: its init, and in how many blocks."""
MAIN = "initialized in the block"


def whole(way: Way, initialize: Callable[[nn.Module], None], blocks: int, cast: bool) -> nn.Module:
    with deferred_init():
        model = way.model()
        if cast:  # what init draws depends on the dtype
            model.to(torch.bfloat16)
        if blocks == 1:
            initialize(model)
    if blocks == 2:
        with deferred_init():
            initialize(model)
    return model


def on_simulated_rank(how: str, step: int) -> dict[str, list[str]]:
    """Return what is wrong on this rank with models that were sharded in each of ``WAYS``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    build, initialize, blocks = BUILDS[how]
    wrong = {}
    for name, way in list(WAYS.items())[::step]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                arguments = options("missing head", Path(folder), way)
                torch.manual_seed(3)
                wanted = whole(way, initialize, blocks, "cast" in name)
                torch.manual_seed(3)
                model = build(way, world)
                materialize(wanted, process_group=False, **arguments)
                way.shard(wanted, world, None)
                materialize(model, process_group=False, **arguments)
                wrong[name] = different(model, wanted)
            except Exception:
                wrong[name] = [traceback.format_exc()]
    return wrong


def different(model: nn.Module, wanted: nn.Module) -> list[str]:
    found, expected = (
        dict([*each.named_parameters(remove_duplicate=False), *each.named_buffers()]) for each in (model, wanted)
    )
    return [name for name in expected.keys() | found.keys() if not alike(found.get(name), expected.get(name))]


@pytest.mark.sweep
def test_every_rank_holds_what_pytorch_cuts_from_the_whole_model(how: str, step: int, world: int) -> None:
    found = run_ranks(world, on_simulated_rank, how=how, step=step, seconds=240 + 60 * world)
    wrong = [(rank, way, names) for rank, its in enumerate(found) for way, names in its.items()]
    assert [each for each in wrong if each[-1]] == []


# -- on one rank -------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> object:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture
def rank_without_elements() -> object:
    dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_model_that_was_sharded_in_the_block_waits_for_values() -> None:
    with deferred_init():
        model = Model()
        fully_shard(model, mesh=one_dimension(2))
    with pytest.raises(UninitializedTensorError, match=r"head\.weight"):
        model(torch.arange(3))


@pytest.mark.usefixtures("one_rank")
def test_a_shard_that_is_written_by_itself_in_the_block_is_an_error() -> None:
    with pytest.raises(RecordingError, match="local tensor of a DTensor"), deferred_init():
        model = Model()
        fully_shard(model, mesh=one_dimension(2))
        init.zeros_(model.head.weight)
        model.head.weight.to_local().data.fill_(1)


@pytest.mark.usefixtures("one_rank")
def test_a_dtensor_of_local_tensors_that_are_no_parts_of_one_is_an_error() -> None:
    with pytest.raises(RecordingError, match="no part of one recorded tensor"), deferred_init():
        model = nn.Linear(4, 4)
        model.weight = nn.Parameter(DTensor.from_local(torch.randn(2, 4), one_dimension(2), [Shard(0)]))


@pytest.mark.usefixtures("one_rank")
def test_gathering_a_dtensor_in_the_block_is_an_error() -> None:
    with pytest.raises(RecordingError, match="full_tensor"), deferred_init():
        distribute_tensor(torch.randn(4, 4), one_dimension(2), [Shard(0)]).full_tensor()


@pytest.mark.usefixtures("one_rank")
def test_code_in_the_block_reads_what_the_shard_holds_by_then() -> None:
    with deferred_init():
        sharded = distribute_tensor(torch.zeros(4, 4), one_dimension(2), [Shard(0)])
        init.ones_(sharded)
        assert sharded.to_local().tolist() == [[1.0] * 4] * 2
        with torch.no_grad():
            assert (sharded * 3).to_local().sum().item() == 24


@pytest.mark.usefixtures("one_rank")
def test_the_unsharded_original_does_not_follow_the_sharded_tensor() -> None:
    with deferred_init():
        model = nn.Linear(4, 4)
        original = model.weight
        fully_shard(model, mesh=one_dimension(2))
        init.zeros_(model.weight)
        assert original.count_nonzero().item() == 16


@pytest.mark.usefixtures("rank_without_elements")
def test_a_shard_without_elements_that_was_cast_is_initialized_in_a_later_block() -> None:
    wanted, model = (recorded_model(Way(block_by_block)) for _ in range(2))
    for each in (wanted, model):
        fully_shard_on(each, one_dimension(8))
        each.to(torch.bfloat16)
    assert not local_part(model.embedding.weight).numel()
    with deferred_init():
        init.normal_(model.embedding.weight)
    materialize(wanted, process_group=False)
    materialize(model, process_group=False)
    assert different(model, wanted) == []


@pytest.mark.usefixtures("one_rank")
def test_a_dtensor_with_values_is_computed_with_in_the_block() -> None:
    values = torch.arange(16.0).reshape(4, 4)
    sharded = distribute_tensor(values, one_dimension(2), [Shard(0)], src_data_rank=None)
    with deferred_init():
        assert local_part(sharded + 1).equal(values[:2] + 1)
        sharded.mul_(2)
        init.zeros_(sharded[:, 0])
    expected = values[:2] * 2
    expected[:, 0] = 0
    assert local_part(sharded).equal(expected)


@pytest.mark.usefixtures("one_rank")
def test_a_dtensor_with_values_beside_a_recorded_one_is_an_error() -> None:
    sharded = distribute_tensor(torch.ones(4, 4), one_dimension(2), [Shard(0)], src_data_rank=None)
    with pytest.raises(RecordingError, match="one of its DTensors was recorded"), deferred_init():
        model = nn.Linear(4, 4)
        fully_shard(model, mesh=one_dimension(2))
        with torch.no_grad():
            model.weight.copy_(sharded)
