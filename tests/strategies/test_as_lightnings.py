"""Where our contract asks for nothing else, a strategy does what Lightning's of the same name does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from inspect import signature
from typing import Any
from unittest import mock

import lightning
import pytest
import torch
from torch import distributed as dist
from torch import nn

from fabric_init import Fabric, strategies
from fabric_init.strategies import DDPStrategy, FSDP2Strategy, FSDPStrategy, ModelParallelStrategy

CPU = torch.device("cpu")


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Let a test start a process group, and end it."""
    with mock.patch.dict(os.environ):
        yield
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"])
def test_a_strategy_shows_lightnings_arguments_and_io(name: str) -> None:
    shown = dict(signature(getattr(strategies, name)).parameters)
    assert shown.pop("io").default == "auto"
    assert shown == dict(signature(getattr(lightning.fabric.strategies, name)).parameters)


def test_a_subclass_with_arguments_of_its_own_shows_these() -> None:
    class Mine(FSDPStrategy):
        def __init__(self, policy: int) -> None: ...

    assert list(signature(Mine).parameters) == ["policy"]


@pytest.mark.parametrize("empty_init", [None, False])
def test_what_a_user_says_of_empty_init_reaches_the_strategy(empty_init: bool | None) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    with (
        mock.patch.object(lightning.fabric.strategies.Strategy, "module_init_context") as theirs,
        fabric.init_module(empty_init=empty_init),
    ):
        pass
    theirs.assert_called_once_with(empty_init=empty_init)


@pytest.mark.parametrize("kind", [DDPStrategy, FSDPStrategy, FSDP2Strategy])
def test_a_strategy_that_is_set_up_by_itself_asks_no_other_rank(kind: Any) -> None:
    strategy = kind()
    strategy.parallel_devices = [CPU, CPU]
    assert strategy.agreement.from_all(["only"]) == ["only"]
    assert [strategy.agreement.alike(digest) for digest in ("same", None)] == [True, False]


def test_ddp_wraps_a_model_with_values_with_lightnings_options() -> None:
    strategy, model = DDPStrategy(parallel_devices=[CPU, CPU], find_unused_parameters=True), nn.Linear(2, 2)
    with mock.patch("lightning.fabric.strategies.ddp.DistributedDataParallel") as ddp:
        strategy.setup_module(model)
    ddp.assert_called_once_with(module=model, device_ids=None, find_unused_parameters=True)


def test_flat_parameters_and_an_optimizer_made_before_them_are_refused_together() -> None:
    strategy, model = FSDPStrategy(parallel_devices=[CPU], use_orig_params=False), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="not supported when setting the model and optimizer up jointly"):
        strategy.setup_module_and_optimizers(model, [torch.optim.SGD(model.parameters())])


@pytest.mark.parametrize("options", [{}, {"empty_init": True}], ids=["with values", "recorded"])
def test_a_parallelize_fn_that_returns_no_module_is_the_same_error(one_rank: None, options: dict[str, Any]) -> None:
    strategy = ModelParallelStrategy(lambda model, mesh: None, data_parallel_size=1, tensor_parallel_size=1)  # type: ignore[arg-type,return-value]
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    fabric.launch()
    with fabric.init_module(**options):
        model = nn.Linear(2, 2)
    if options:
        fabric.init_missing(model)
    with pytest.raises(TypeError, match=r"`parallelize_fn` must return a `nn\.Module` instance, but got: NoneType"):
        fabric.setup(model)


def test_lightnings_own_fabric_gives_optimizers_the_sharded_parameters_too(one_rank: None) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, strategy=FSDP2Strategy())
    fabric.launch()
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    handle = fabric.setup_module(model)
    fabric.setup_optimizers(optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in handle.parameters()]
