"""What is filled can be trained, saved and loaded like any model of Fabric's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.ranks import run_ranks, run_ranks_each
from tests.support.zoo import (
    STRATEGIES,
    assert_close,
    assert_same,
    build,
    launch,
    loss_of,
    one_device,
    runnable,
    set_up,
    tokens,
    weights,
    write_checkpoint,
)

ROWS = 2  # of a batch, on each rank
ONE_AFTER_THE_OTHER = [strategy for strategy in STRATEGIES if "deepspeed" not in strategy]
"""DeepSpeed takes model and optimizer together, and accumulates gradients by its own config."""
in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw in two groups": lambda model: torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.02},
        ],
        lr=0.01,
    ),
}


def one_device_steps(
    model: nn.Module, world_size: int, steps: int, optimizer: str = "sgd", start: int = 0
) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Train on the batches of all ranks at once."""
    made = OPTIMIZERS[optimizer](model)
    for step in range(start, start + steps):
        loss_of(model, tokens(step, ROWS * world_size)).backward()
        made.step()
        made.zero_grad()
    return weights(model), made


def rank_steps(fabric: Any, model: nn.Module, optimizer: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        mine = tokens(step, ROWS * fabric.world_size)[fabric.global_rank * ROWS :][:ROWS]
        fabric.backward(loss_of(model, mine))
        optimizer.step()
        optimizer.zero_grad()


def train(strategy: str, name: str, path: Path | None, order: str, optimizer: str) -> dict[str, Tensor]:
    fabric = launch(strategy)
    options: dict[str, Any] = {"empty_init": True} if path is None else {"checkpoint": path, "strict": False}
    model = build(fabric, name, **options)
    made: Any
    if order == "model, then optimizer":
        model, made = set_up(fabric, model, OPTIMIZERS[optimizer])
        if path is None:
            fabric.init_missing(model)
    elif order == "together":
        made = OPTIMIZERS[optimizer](model)
        model, made = fabric.setup(model, made)
        if path is None:
            fabric.init_missing(model)
    else:
        assert order == "optimizer made first, set up last"
        made = OPTIMIZERS[optimizer](model)
        model = fabric.setup_module(model)
        made = fabric.setup_optimizers(made)
    rank_steps(fabric, model, made, 3)
    return weights(model)


@pytest.mark.sweep(*(f"{strategy}-2" for strategy in STRATEGIES), "fsdp2-4")
@pytest.mark.parametrize("world_size", [2, 4])
@in_every_strategy
def test_three_steps_as_on_one_device(strategy: str, world_size: int, tmp_path: Path) -> None:
    names = [runnable(name, strategy) for name in ("uneven", "transformerish", "cross_tied")]
    paths = {name: write_checkpoint(tmp_path / f"{name}.safetensors", name, partial=True) for name in names}
    cases = {name: {"name": name, "path": path} for name, path in paths.items()}
    arguments = {"strategy": strategy, "order": "model, then optimizer", "optimizer": "sgd"}
    for name, ranks in run_ranks_each(world_size, train, cases, **arguments).items():
        model = one_device(name, checkpoint=paths[name], strict=False)
        expected, _ = one_device_steps(model, world_size, 3)
        for found in ranks:
            assert_close(found, expected)


@in_every_strategy
def test_three_steps_from_scratch(strategy: str) -> None:
    expected, _ = one_device_steps(one_device("transformerish"), 2, 3)
    arguments = {"name": "transformerish", "path": None, "order": "model, then optimizer", "optimizer": "sgd"}
    for found in run_ranks(2, train, strategy=strategy, **arguments):
        assert_close(found, expected)


@in_every_strategy
def test_an_optimizer_made_before_setup_trains_the_model(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    orders = ["together", *["optimizer made first, set up last"] * (strategy in ONE_AFTER_THE_OTHER)]
    cases = {
        (order, optimizer): {"order": order, "optimizer": optimizer} for order in orders for optimizer in OPTIMIZERS
    }
    trained = run_ranks_each(2, train, cases, strategy=strategy, name="transformerish", path=path)
    for (_, optimizer), ranks in trained.items():
        expected, _ = one_device_steps(one_device("transformerish", checkpoint=path), 2, 3, optimizer)
        for found in ranks:
            assert_close(found, expected, rtol=1e-4, atol=1e-5)


@in_every_strategy
def test_an_optimizer_made_for_a_model_that_has_no_values_yet(strategy: str) -> None:
    name = runnable("uneven", strategy)
    expected, _ = one_device_steps(one_device(name), 2, 3)
    arguments = {"name": name, "path": None, "order": "together", "optimizer": "sgd"}
    for found in run_ranks(2, train, strategy=strategy, **arguments):
        assert_close(found, expected)


# -- gradient accumulation, compiled modules ---------------------------------------------------------------------------


def accumulate(strategy: str, path: Path) -> dict[str, Tensor]:
    fabric = launch(strategy)
    model = fabric.setup_module(build(fabric, "uneven", checkpoint=path))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    mine = tokens(0, ROWS * fabric.world_size)[fabric.global_rank * ROWS :][:ROWS]
    with fabric.no_backward_sync(model):
        fabric.backward(loss_of(model, mine[:1]) / 2)
    fabric.backward(loss_of(model, mine[1:]) / 2)
    optimizer.step()
    optimizer.zero_grad()
    return weights(model)


@pytest.mark.parametrize("strategy", ONE_AFTER_THE_OTHER)
def test_accumulated_gradients(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "uneven")
    model = one_device("uneven", checkpoint=path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, tokens(0, ROWS * 2)).backward()
    optimizer.step()
    for found in run_ranks(2, accumulate, strategy=strategy, path=path):
        assert_close(found, weights(model))


def set_up_compiled(strategy: str, path: Path) -> tuple[dict[str, Tensor], float, bool]:
    fabric = launch(strategy)
    model = build(fabric, "transformerish", checkpoint=path)
    compiled = fabric.setup(torch.compile(model, backend="eager"))
    recompiled = any(type(module).__name__ == "OptimizedModule" for module in compiled.modules())
    return weights(compiled), loss_of(compiled, tokens(0)).item(), recompiled


@pytest.mark.sweep("ddp", "fsdp", "fsdp2", "deepspeed_stage_2")  # compiling ZeRO-3's hooks takes long
@in_every_strategy
def test_a_compiled_module(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    expected = one_device("transformerish", checkpoint=path)
    for found, loss, recompiled in run_ranks(2, set_up_compiled, strategy=strategy, path=path):
        assert_same(found, weights(expected))
        assert loss == pytest.approx(loss_of(expected, tokens(0)).item(), rel=1e-5)
        assert recompiled


# -- save and load -----------------------------------------------------------------------------------------------------


def train_and_save(strategy: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    fabric = launch(strategy)
    model = build(fabric, "transformerish", seed=1, empty_init=True)
    model, optimizer = set_up(fabric, model, OPTIMIZERS["adamw in two groups"])
    fabric.init_missing(model)
    rank_steps(fabric, model, optimizer, 2)
    saved = weights(model)
    fabric.save(folder / "state", {"model": model, "optimizer": optimizer, "step": 2})
    rank_steps(fabric, model, optimizer, 2, start=2)
    return saved, weights(model)


def load_and_train(strategy: str, folder: Path, empty_init: bool) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
    fabric = launch(strategy)
    model = build(fabric, "transformerish", seed=1000, empty_init=empty_init)
    model, optimizer = set_up(fabric, model, OPTIMIZERS["adamw in two groups"])
    state = {"model": model, "optimizer": optimizer, "step": 0}
    fabric.load(folder / "state", state)
    loaded = weights(model)
    rank_steps(fabric, model, optimizer, 2, start=2)
    return state["step"], loaded, weights(model)


@pytest.mark.sweep(*(f"{strategy}-2-True" for strategy in STRATEGIES), "fsdp2-4-False", "deepspeed_stage_3-2-False")
@pytest.mark.parametrize("empty_init", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
@in_every_strategy
def test_save_and_load(strategy: str, world_size: int, empty_init: bool, tmp_path: Path) -> None:
    saved, ended = run_ranks(world_size, train_and_save, strategy=strategy, folder=tmp_path)[0]
    again = run_ranks(world_size, load_and_train, strategy=strategy, folder=tmp_path, empty_init=empty_init)
    for step, loaded, trained in again:
        assert step == 2
        assert_same(loaded, saved)
        for parameter, value in trained.items():  # gloo adds up in another order once DDP has rebuilt its buckets
            torch.testing.assert_close(value, ended[parameter])
