"""Real ranks of plain PyTorch: record, shard with torch's own functions, then fill or load, and train."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fabric_init import FabricInitError, UninitializedTensorError, deferred_init, init_missing, materialize
from fabric_init.errors import RanksDisagreeError
from tests.sharding.ways import (
    VOCABULARY,
    Model,
    block_by_block,
    fsdp_over_tensor_parallel,
    hybrid,
    local_part,
    tensor_parallel,
)
from tests.support.ranks import run_ranks

Shard = Callable[[nn.Module, int, int | None], None]
SECONDS = 20.0
"""Within which a rank has to hear of the error of another."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = {name: value + 1 for name, value in wide().state_dict().items()}
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(state, path)
    return path


def wide() -> nn.Module:
    """Return a model that 2-D sharding can train: PyTorch wants its dimensions to be even."""
    return Model(8)


def start(seed: int = 3) -> nn.Module:
    """Return a recorded model, on a rank of the process group that this starts."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    with deferred_init():
        return wide()


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def rank_here() -> int:
    return int(os.environ["RANK"])


def gathered(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def train(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.arange(VOCABULARY)).tanh().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_device(**options: Any) -> nn.Module:
    """Return the model with values and whole, on this rank alone."""
    torch.manual_seed(3)
    with deferred_init():
        model = wide()
    materialize(model, process_group=False, **options)
    return model


# -- the same as a model that was sharded with values ------------------------------------------------------------------


def fill_and_train(shard: Shard, options: dict[str, Any]) -> None:
    model = start()
    wanted = one_device(**options)
    weights = gathered(wanted)
    for each in (model, wanted):
        shard(each, world_size(), 0)
    materialize(model, **options)
    assert_same(gathered(model), weights)
    assert train(model) == train(wanted)
    assert_same(gathered(model), gathered(wanted))


@pytest.mark.parametrize("from_scratch", [False, True], ids=["checkpoint", "from scratch"])
@pytest.mark.parametrize("shard", [block_by_block, tensor_parallel])
def test_two_ranks_train_as_on_a_model_that_was_sharded_with_values(
    shard: Shard, from_scratch: bool, path: Path
) -> None:
    run_ranks(2, fill_and_train, shard=shard, options={} if from_scratch else {"checkpoint": path})


@pytest.mark.parametrize("shard", [hybrid, fsdp_over_tensor_parallel])
def test_four_ranks_train_as_on_a_model_that_was_sharded_with_values(shard: Shard, path: Path) -> None:
    run_ranks(4, fill_and_train, shard=shard, options={"checkpoint": path})


def fill_with_own_seed(shard: Shard | None) -> dict[str, Tensor]:
    model = start(seed=3 + rank_here())
    if shard is not None:
        shard(model, world_size(), 0)
    materialize(model)
    return gathered(model)


@pytest.mark.parametrize("shard", [block_by_block, tensor_parallel, None])
def test_ranks_that_were_seeded_differently_hold_the_model_of_rank_zero(shard: Shard | None) -> None:
    with torch.random.fork_rng(devices=[]):
        wanted = gathered(one_device())
    for found in run_ranks(2, fill_with_own_seed, shard=shard):
        assert_same(found, wanted)


def replicate(path: Path) -> dict[str, Tensor]:
    model = start()
    materialize(model, checkpoint=path)
    model = DistributedDataParallel(model)
    train(model)
    return gathered(model.module)


def test_ddp_takes_the_filled_model(path: Path) -> None:
    one, other = run_ranks(2, replicate, path=path)
    assert_same(one, other)


# -- loaders of PyTorch, onto shards that wait -------------------------------------------------------------------------


def distributed_like(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Return what is in the file, sharded as the model is."""
    state = load_file(path)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            state[name] = distribute_tensor(state[name], tensor.device_mesh, tensor.placements)
    return state


def load_dtensors(model: nn.Module, path: Path) -> None:
    model.load_state_dict(distributed_like(model, path))


def load_from_rank_zero(model: nn.Module, path: Path) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, load_file(path) if rank_here() == 0 else {}, options=options)


def load_full_on_every_rank(model: nn.Module, path: Path) -> None:
    set_model_state_dict(model, load_file(path), options=StateDictOptions(full_state_dict=True))


def load_after_sharding(load: Callable[[nn.Module, Path], None], path: Path) -> None:
    model = start()
    block_by_block(model, world_size(), 0)
    load(model, path)
    init_missing(model)  # the buffers that no checkpoint has
    wanted = one_device(checkpoint=path)
    assert_same(gathered(model), gathered(wanted))
    block_by_block(wanted, world_size(), 0)
    assert train(model) == train(wanted)


@pytest.mark.parametrize("load", [load_dtensors, load_from_rank_zero, load_full_on_every_rank])
def test_a_loader_of_pytorch_fills_shards_that_wait(load: Callable[[nn.Module, Path], None], path: Path) -> None:
    run_ranks(2, load_after_sharding, load=load, path=path)


def load_without_head(path: Path) -> None:
    model = start(seed=3 + rank_here())
    block_by_block(model, world_size(), 0)
    state = distributed_like(model, path)
    del state["head.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["head.weight"]
    with pytest.raises(UninitializedTensorError, match=r"head\.weight"):
        model(torch.arange(VOCABULARY))
    init_missing(model)
    wanted = {**gathered(one_device(checkpoint=path)), "head.weight": gathered(one_device())["head.weight"]}
    assert_same(gathered(model), wanted)


def test_init_missing_gives_a_head_that_was_not_loaded_the_values_of_rank_zero(path: Path) -> None:
    run_ranks(2, load_without_head, path=path)


def write_without(names: list[str], path: Path) -> None:
    for name in names:
        model = start(seed=3 + rank_here())
        block_by_block(model, world_size(), 0)
        own = model.state_dict()
        with torch.no_grad():
            for key, value in distributed_like(model, path).items():
                if key != name:
                    local_part(own[key]).copy_(local_part(value))
        init_missing(model)
        wanted = {**gathered(one_device(checkpoint=path)), name: gathered(one_device())[name]}
        assert_same(gathered(model), wanted)


def test_init_missing_keeps_ranks_together_that_hold_nothing_of_what_was_not_written(path: Path) -> None:
    run_ranks(2, write_without, names=["one", "blocks.0.up.weight"], path=path)


def load_without(name: str, path: Path) -> str:
    model = start()
    block_by_block(model, world_size(), 0)
    state = distributed_like(model, path)
    del state[name]
    model.load_state_dict(state, strict=False)
    with pytest.raises(UninitializedTensorError) as raised:
        model(torch.arange(VOCABULARY))
    return str(raised.value)


def test_a_rank_that_holds_nothing_of_what_was_not_loaded_raises_as_the_other_does(path: Path) -> None:
    for message in run_ranks(2, load_without, name="one", path=path):
        assert "\n  one\n" in message


# -- errors, on every rank ---------------------------------------------------------------------------------------------


def use_before_values() -> str:
    model = start()
    block_by_block(model, world_size(), 0)
    with pytest.raises(UninitializedTensorError) as raised:
        model(torch.arange(VOCABULARY))
    return str(raised.value)


def test_a_forward_before_there_are_values_raises_on_every_rank() -> None:
    for message in run_ranks(2, use_before_values):
        assert "blocks.0.up.weight" in message
        assert "fabric_init.materialize(model)" in message


def raise_in_the_block(odd: int) -> tuple[str, str, float]:
    dist.init_process_group("gloo")
    begin = time.monotonic()
    with pytest.raises((FabricInitError, LookupError)) as raised:
        with deferred_init():
            model = wide()
            if rank_here() == odd:
                raise LookupError("the user's own mistake")
        materialize(model)
    took = time.monotonic() - begin
    with deferred_init():
        model = wide()
    materialize(model)
    return raised.type.__name__, str(raised.value), took


@pytest.mark.parametrize("odd", [0, 1])
def test_an_error_in_the_block_of_one_rank_is_told_to_the_other_when_they_meet(odd: int) -> None:
    found = run_ranks(2, raise_in_the_block, odd=odd)
    assert found[odd][:2] == ("LookupError", "the user's own mistake")
    assert found[1 - odd][0] == "FabricInitError"
    assert found[1 - odd][1].startswith(f"the deferred_init block failed on rank {odd}, ")
    assert found[1 - odd][1].endswith(f"Rank {odd}: LookupError: the user's own mistake")
    assert max(seconds for *_, seconds in found) < SECONDS


def raise_in_a_block_of_its_own() -> float:
    dist.init_process_group("gloo")
    begin = time.monotonic()
    if rank_here() == 0:
        with pytest.raises(LookupError), deferred_init():
            raise LookupError
    dist.barrier()
    return time.monotonic() - begin


def test_an_error_in_a_block_that_one_rank_alone_has_keeps_nobody_waiting() -> None:
    assert max(run_ranks(2, raise_in_a_block_of_its_own)) < SECONDS


def load_own_path(paths: list[Path]) -> tuple[str, float]:
    model = start()
    block_by_block(model, world_size(), 0)
    dist.barrier()
    begin = time.monotonic()
    with pytest.raises(FabricInitError) as raised:
        materialize(model, checkpoint=paths[rank_here()])
    took = time.monotonic() - begin
    assert all(local_part(parameter).device.type == "cpu" for parameter in model.parameters())
    with pytest.raises(UninitializedTensorError):
        model.blocks[0].up.weight.to_local().tolist()
    return str(raised.value), took


@pytest.mark.parametrize("without", [0, 1])
def test_a_path_that_one_rank_does_not_have_is_an_error_on_both(without: int, path: Path) -> None:
    paths = [path, path]
    paths[without] = path.with_name("missing.safetensors")
    for message, seconds in run_ranks(2, load_own_path, paths=paths):
        assert "missing.safetensors" in message
        assert seconds < SECONDS


def fill_different_models(from_scratch: bool, path: Path) -> str:
    model = start()
    if rank_here() == 1:
        with deferred_init():
            model.head = nn.Linear(8, VOCABULARY + 1, bias=False)
    block_by_block(model, world_size(), 0)
    with pytest.raises(RanksDisagreeError) as raised:
        materialize(model, **({} if from_scratch else {"checkpoint": path, "strict": False, "reinit": ["head.*"]}))
    return str(raised.value)


@pytest.mark.parametrize("from_scratch", [False, True], ids=["checkpoint", "from scratch"])
def test_ranks_that_shard_different_models_all_hear_of_it(from_scratch: bool, path: Path) -> None:
    for message in run_ranks(2, fill_different_models, from_scratch=from_scratch, path=path):
        assert "every rank" in message


# -- ranks that hold different parts -----------------------------------------------------------------------------------


def fill_own_stage(path: Path) -> dict[str, Tensor]:
    model = start()
    name = str(rank_here())
    stage = nn.ModuleDict({"blocks": nn.ModuleDict({name: model.blocks[rank_here()]})})
    own = stage.state_dict().keys()
    materialize(stage, checkpoint=path, rename=lambda key: key if key in own else None, process_group=False)
    return gathered(stage)


def test_each_rank_fills_a_stage_of_its_own(path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        wanted = gathered(one_device(checkpoint=path))
    for rank, found in enumerate(run_ranks(2, fill_own_stage, path=path)):
        assert_same(found, {name: value for name, value in wanted.items() if name.startswith(f"blocks.{rank}.")})


def fill_in_a_group(path: Path | None) -> dict[str, Tensor] | None:
    model = start(seed=3 if rank_here() == 1 else 100)
    group = dist.new_group([1, 2])
    if rank_here() == 0:
        with pytest.raises(ValueError, match="rank 0 is not in the process_group"):
            materialize(model, process_group=group)
        return None
    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    materialize(model, checkpoint=path, process_group=group)
    return gathered(model)


@pytest.mark.parametrize("from_scratch", [False, True], ids=["checkpoint", "from scratch"])
def test_two_ranks_of_three_fill_a_model_by_themselves(from_scratch: bool, path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        wanted = gathered(one_device(checkpoint=None if from_scratch else path))
    outside, *inside = run_ranks(3, fill_in_a_group, path=None if from_scratch else path)
    assert outside is None
    for found in inside:
        assert found is not None
        assert_same(found, wanted)
