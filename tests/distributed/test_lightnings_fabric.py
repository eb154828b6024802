"""Our strategies in an unchanged ``lightning.Fabric``: what is built without values is guarded and can be completed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning
import lightning.fabric.strategies
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import fabric_init.strategies
from fabric_init import UninitializedTensorError, init_missing, init_report, strategies
from tests.distributed.test_training import OPTIMIZERS, one_device_steps, rank_steps
from tests.support.ranks import run_ranks, run_ranks_each
from tests.support.zoo import (
    MODELS,
    assert_close,
    assert_same,
    one_device,
    prepare_deepspeed,
    tokens,
    weights,
    write_checkpoint,
)

STRATEGIES = {
    "ddp": strategies.DDPStrategy,
    "fsdp2": strategies.FSDP2Strategy,
    "fsdp2 by size": lambda: strategies.FSDP2Strategy(units=100),
    "ZeRO-2": lambda: strategies.DeepSpeedStrategy(stage=2),
    "ZeRO-3": lambda: strategies.DeepSpeedStrategy(stage=3),
}
with_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def launched(strategy: str) -> lightning.Fabric:
    made = STRATEGIES[strategy]()
    if isinstance(made, strategies.DeepSpeedStrategy):
        prepare_deepspeed(made)
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=made)
    fabric.launch()
    return fabric


def build(fabric: lightning.Fabric, name: str) -> nn.Module:
    torch.manual_seed(1)
    with fabric.init_module(empty_init=True):
        return MODELS[name]()


def complete(strategy: str, name: str, how: str, path: Path) -> tuple[str, set[str], dict[str, Tensor]]:
    fabric = launched(strategy)
    model = fabric.setup(build(fabric, name))
    with pytest.raises(UninitializedTensorError) as raised:
        model(tokens(0))
    if how == "load":
        fabric.load_raw(path, model, strict=False)
    else:
        init_missing(model)
    return str(raised.value), {row.status for row in init_report(model).rows}, weights(model)


@with_every_strategy
def test_a_model_is_guarded_until_it_is_complete(strategy: str, tmp_path: Path) -> None:
    paths = {
        name: write_checkpoint(tmp_path / f"{name}.pt", name, partial=True) for name in ("transformerish", "uneven")
    }
    hows = ("load", "own init")
    cases = {(name, how): {"name": name, "how": how, "path": path} for name, path in paths.items() for how in hows}
    for (name, how), ranks in run_ranks_each(2, complete, cases, strategy=strategy).items():
        expected = one_device(name, checkpoint=paths[name], strict=False) if how == "load" else one_device(name)
        for message, statuses, found in ranks:
            assert "init_missing" in message
            assert "unfilled" not in statuses
            assert ("loaded" in statuses) == (how == "load")
            assert_same(found, weights(expected))


def train(strategy: str) -> dict[str, Tensor]:
    fabric = launched(strategy)
    model: Any = build(fabric, "transformerish")
    model, optimizer = fabric.setup(model, OPTIMIZERS["adamw in two groups"](model))
    init_missing(model)
    rank_steps(fabric, model, optimizer, 3)
    return weights(model)


@with_every_strategy
def test_an_optimizer_made_before_setup_trains_the_model(strategy: str) -> None:
    expected, _ = one_device_steps(one_device("transformerish"), 2, 3, "adamw in two groups")
    for found in run_ranks(2, train, strategy=strategy):
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh["data_parallel"])


def loaded_raw(package: Any, path: Path, strict: bool) -> dict[str, Tensor] | str:
    made = package.strategies.ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=made)
    fabric.launch()
    torch.manual_seed(1)
    model = fabric.setup(MODELS["even, untied"]())
    try:
        fabric.load_raw(path, model, strict=strict)
    except KeyError as error:
        return str(error)
    return weights(model)


def load_both_ways(path: Path, strict: bool) -> tuple[dict[str, Tensor] | str, dict[str, Tensor] | str]:
    return loaded_raw(lightning.fabric, path, strict), loaded_raw(fabric_init, path, strict)


@pytest.mark.parametrize("lacks", ["nothing", "a part"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_load_raw_takes_and_refuses_the_files_that_lightnings_does(lacks: str, strict: bool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "even, untied", partial=lacks == "a part")
    torch.save({**torch.load(path), "unexpected": torch.ones(2)}, path)
    for theirs, ours in run_ranks(2, load_both_ways, path=path, strict=strict):
        assert isinstance(ours, str) == (strict and lacks == "a part")
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs
        else:
            assert_same(ours, theirs)


def load_own_file(ours: bool, folder: Path, same_name: bool) -> dict[str, Tensor] | str:
    """Load a file of this rank's own: by a path that only this rank has, or by the same path on another disk."""
    own = folder / os.environ["RANK"]
    if same_name:
        os.chdir(own)
    package = fabric_init if ours else lightning.fabric
    return loaded_raw(package, Path("raw.pt") if same_name else own / "raw.pt", strict=True)


@pytest.mark.parametrize("same_name", [True, False], ids=["one path, two disks", "two paths"])
def test_load_raw_loads_the_file_of_rank_0_as_lightnings_does(same_name: bool, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        path = write_checkpoint(tmp_path / rank / "raw.pt", "even, untied")
        torch.save({key: value + int(rank) for key, value in torch.load(path).items()}, path)
    theirs, ours = (
        run_ranks(2, load_own_file, ours=ours, folder=tmp_path, same_name=same_name) for ours in (False, True)
    )
    for their, our in zip(theirs, ours, strict=True):
        assert_same(our, their)
