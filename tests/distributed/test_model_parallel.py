"""Lightning's ``ModelParallelStrategy`` with a user's ``parallelize_fn``: tensor parallel, alone and with FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_init import Fabric
from tests.support.ranks import run_ranks
from tests.support.zoo import (
    assert_close,
    assert_same,
    build,
    launch,
    loss_of,
    one_device,
    tokens,
    weights,
    write_checkpoint,
)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for layer in model.layers:  # 13 × 6 and 6 × 13: uneven along either dimension
        parallelize_module(layer, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            fully_shard(layer, mesh=mesh["data_parallel"])
    if mesh["data_parallel"].size() > 1:
        fully_shard(model, mesh=mesh["data_parallel"])
    return model


def fill(fabric: Fabric, name: str, path: Path | None) -> nn.Module:
    if path is not None:
        return fabric.setup(build(fabric, name, checkpoint=path, strict=False))
    model = fabric.setup(build(fabric, name, empty_init=True))
    fabric.init_missing(model)
    return model


def filled(data: int, tensor: int, path: Path | None, **options: Any) -> tuple[dict[str, Tensor], set[str]]:
    strategy = ModelParallelStrategy(tensor_parallel, data_parallel_size=data, tensor_parallel_size=tensor)
    fabric = launch(strategy, **options)
    model = fill(fabric, "transformerish", path)
    return weights(model), {str(value.placements) for value in model.parameters() if isinstance(value, DTensor)}


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "from scratch"])
@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 1), (2, 2)])
def test_a_region_is_what_the_dtensor_says(data: int, tensor: int, checkpoint: bool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish", partial=True) if checkpoint else None
    expected = weights(one_device("transformerish", checkpoint=path, strict=path is None))
    for found, placements in run_ranks(data * tensor, filled, data=data, tensor=tensor, path=path):
        assert_same(found, expected)
        assert any("Shard(dim=1)" in placement for placement in placements), placements
        assert ("_StridedShard" in str(placements)) == (data == 2 and tensor == 2)


def test_one_rank_may_read_for_all_of_a_two_dimensional_mesh(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish", partial=True)
    expected = weights(one_device("transformerish", checkpoint=path, strict=False))
    for found, _ in run_ranks(4, filled, data=2, tensor=2, path=path, io="broadcast"):
        assert_same(found, expected)


def step(model: nn.Module) -> float:
    loss = loss_of(model, tokens(0))
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    return loss.item()


def train(path: Path) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    fabric = launch(ModelParallelStrategy(tensor_parallel, data_parallel_size=2, tensor_parallel_size=2))
    model = fill(fabric, "even", path)
    return weights(model), step(model), weights(model)


def test_training_on_a_two_dimensional_mesh(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "even", partial=True)
    model = one_device("even", checkpoint=path, strict=False)
    before, loss, after = weights(model), step(model), weights(model)
    for found, found_loss, trained in run_ranks(4, train, path=path):
        assert_same(found, before)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert_close(trained, after, rtol=1e-4, atol=1e-5)


def in_copies(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh["data_parallel", "tensor_parallel"])  # copies along the first dimension
    return model


def run_one_copy_first() -> float:
    fabric = launch(ModelParallelStrategy(in_copies, data_parallel_size=2, tensor_parallel_size=2))
    model = fabric.setup(build(fabric, "even", empty_init=True))
    with torch.no_grad():
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            parameter.to_local().fill_(0.5)
        first = loss_of(model, tokens(0)).item() if fabric.global_rank < 2 else None
        fabric.barrier()
        return loss_of(model, tokens(0)).item() if first is None else first


def test_the_ranks_of_one_copy_run_it_while_the_others_do_not() -> None:
    first, *others = run_ranks(4, run_one_copy_first, seconds=20)
    assert others == [first] * 3
