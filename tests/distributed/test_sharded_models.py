"""What users do to a model before and after FSDP2 shards it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from fabric_init import FabricInitError, RecordingError, UninitializedTensorError
from fabric_init.strategies import FSDP2Strategy, ModelParallelStrategy
from tests.support.ranks import run_ranks, run_ranks_each
from tests.support.zoo import (
    Block,
    assert_close,
    assert_same,
    build,
    inner,
    launch,
    loss_of,
    one_device,
    tokens,
    weights,
    write_checkpoint,
)

LATE = {late: {"late": late} for late in (False, True)}
"""Loaded after setup, or declared."""


def checkpointed(path: Path, late: bool) -> dict[str, Tensor]:
    fabric = launch("fsdp2")
    model = build(fabric, "transformerish", **({"empty_init": True} if late else {"checkpoint": path}))
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    model = fabric.setup_module(model)
    if late:
        model.load_state_dict(torch.load(path))
    fabric.backward(loss_of(model, tokens(0)))
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in weights(model).items()}


def test_blocks_may_be_wrapped_for_activation_checkpointing_before_setup(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish")
    for ranks in run_ranks_each(2, checkpointed, LATE, path=path).values():
        for found in ranks:
            assert_same(found, weights(one_device("transformerish", checkpoint=path)))


def with_a_new_norm(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    model.norm = nn.LayerNorm(6)
    nn.init.constant_(model.norm.weight, 5.0)
    return fully_shard(model, mesh=mesh["data_parallel"])


def replaced(path: Path, late: bool) -> dict[str, Tensor]:
    fabric = launch(ModelParallelStrategy(with_a_new_norm, data_parallel_size=2, tensor_parallel_size=1))
    model = fabric.setup_module(
        build(fabric, "transformerish", **({"empty_init": True} if late else {"checkpoint": path}))
    )
    fabric.init_missing(model)
    return weights(model)


def test_values_that_parallelize_fn_brings_stay(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish")
    for late, ranks in run_ranks_each(2, replaced, LATE, path=path).items():
        expected = weights(one_device("transformerish", checkpoint=None if late else path))
        expected |= {"norm.weight": torch.full((6,), 5.0), "norm.bias": torch.zeros(6)}
        for found in ranks:
            assert_same(found, expected)


def loaded_between(path: Path) -> dict[str, Tensor]:
    fabric = launch(FSDP2Strategy(reshard_after_forward=False))
    model = fabric.setup_module(build(fabric, "transformerish", empty_init=True))
    fabric.init_missing(model)
    with torch.no_grad():
        model(tokens(0))
    model.load_state_dict(torch.load(path))
    return weights(model)


def test_whole_tensors_can_be_loaded_while_units_are_gathered(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish")
    for found in run_ranks(2, loaded_between, path=path):
        assert_same(found, weights(one_device("transformerish", checkpoint=path)))


def kept_alive() -> list[bool]:
    fabric = launch("fsdp2")
    model = build(fabric, "transformerish", empty_init=True)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.init_missing(model)
    fabric.backward(loss_of(model, tokens(0)))
    optimizer.step()
    alive = [weakref.ref(inner(model)), weakref.ref(inner(model).lm_head.weight)]
    del model, optimizer
    gc.collect()
    return [reference() is not None for reference in alive]


def test_the_strategy_keeps_no_model_alive() -> None:
    assert run_ranks(2, kept_alive) == [[False, False]] * 2


def blocks_alone(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"])
    return model


def one_rank_alone(path: Path) -> bool:
    fabric = launch(ModelParallelStrategy(blocks_alone, data_parallel_size=2, tensor_parallel_size=1))
    model = fabric.setup_module(build(fabric, "transformerish", empty_init=True))
    model.load_state_dict(torch.load(path))
    if fabric.global_rank == 0:
        inner(model).norm(torch.ones(2, 6))
    fabric.barrier()
    return bool(loss_of(model, tokens(0)).isfinite())


def test_what_is_whole_on_every_rank_may_run_on_one_alone(tmp_path: Path) -> None:
    assert run_ranks(2, one_rank_alone, path=write_checkpoint(tmp_path / "raw.pt", "transformerish")) == [True, True]


def part_alone() -> str:
    fabric = launch("fsdp2")
    with pytest.raises(RecordingError) as raised:
        fabric.setup_module(build(fabric, "transformerish", empty_init=True).layers[0])
    return str(raised.value)


def test_a_part_of_a_recorded_model_is_refused_and_told_why() -> None:
    assert all("with all that its block built" in message for message in run_ranks(2, part_alone))


MOVES: dict[str, Callable[[Any], object]] = {
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "to_empty, a part": lambda model: model.layers[1].to_empty(device="cpu"),
    "half": lambda model: model.half().float(),
}


def moved(move: str) -> dict[str, Tensor]:
    fabric = launch("fsdp2")
    model = fabric.setup_module(build(fabric, "transformerish", empty_init=True))
    MOVES[move](model)
    with pytest.raises(UninitializedTensorError, match=r"layers\.1\.up\.weight"):
        model(tokens(0))
    fabric.init_missing(model)
    return weights(model)


def test_shards_without_values_that_are_moved_go_on_waiting() -> None:
    expected = {
        name: value.half().float() if value.is_floating_point() else value
        for name, value in weights(one_device("transformerish")).items()
    }
    for ranks in run_ranks_each(2, moved, {move: {"move": move} for move in MOVES}).values():
        for found in ranks:
            # to_empty() empties what had its values before the block, as it does in plain PyTorch
            as_built = {name for name in expected if name.endswith("scale")}
            assert_close(
                {n: v for n, v in found.items() if n not in as_built},
                {n: v for n, v in expected.items() if n not in as_built},
                atol=1e-3,
            )


class Own(nn.Module):
    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden, (6,), self.weight, self.bias)


def taken_over() -> dict[str, Tensor]:
    fabric = launch("deepspeed_stage_3")
    model = fabric.setup_module(build(fabric, "transformerish", empty_init=True))
    inner(model).norm = Own(inner(model).norm)
    with pytest.raises(UninitializedTensorError, match=r"norm\.weight"):
        model(tokens(0))
    fabric.init_missing(model)
    return weights(model)


def test_a_module_that_takes_over_slices_without_values_waits_for_them() -> None:
    for found in run_ranks(2, taken_over):
        assert_same(found, weights(one_device("transformerish")))


def left_behind(path: Path) -> None:
    fabric = launch("fsdp2")
    model = build(fabric, "transformerish", empty_init=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(torch.load(path), assign=True)
    with pytest.raises(FabricInitError, match=r"this SGD holds parameters without memory"):
        fabric.setup(model, optimizer)


def test_an_optimizer_of_parameters_that_the_model_has_no_more_is_refused(tmp_path: Path) -> None:
    run_ranks(2, left_behind, path=write_checkpoint(tmp_path / "raw.pt", "transformerish"))


class Derived(nn.Module):
    """One parameter is computed from a buffer, which every rank has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scales", torch.arange(6.0).reshape(2, 3))
        self.weight = nn.Parameter(self.scales * 2)
        self.out = nn.Linear(3, 2)


def derived() -> dict[str, Tensor]:
    fabric = launch("fsdp2")
    with fabric.init_module(empty_init=True):
        model = Derived()
    wrapped = fabric.setup_module(model)
    wrapped.load_state_dict({"scales": torch.full((2, 3), 7.0)}, strict=False)
    fabric.init_missing(wrapped)
    return weights(wrapped)


def test_a_shard_is_computed_from_what_was_loaded_since() -> None:
    for found in run_ranks(2, derived):
        assert torch.equal(found["weight"], torch.full((2, 3), 14.0))


ACTIVATION = nn.Tanh()


class Active(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(4, 4), ACTIVATION


def with_one_activation(folder: Path) -> tuple[Any, ...]:
    fabric = launch("fsdp2")
    models = []
    for name in ("one.pt", "other.pt"):
        with fabric.init_module(checkpoint=folder / name, strict=False):
            models.append(Active())
    reports = [fabric.init_report(fabric.setup_module(model)) for model in models]
    return tuple((report.checkpoint, report.unexpected) for report in reports)


def test_models_that_share_an_activation_share_no_checkpoint(tmp_path: Path) -> None:
    for name in ("one", "other"):
        torch.save(Active().state_dict() | {name: torch.ones(1)}, tmp_path / f"{name}.pt")
    own = tuple((str(tmp_path / f"{name}.pt"), (name,)) for name in ("one", "other"))
    assert run_ranks(2, with_one_activation, folder=tmp_path) == [own, own]


def full_of(value: float, *names: str) -> dict[str, Tensor]:
    return {
        f"{name}{key}": torch.full_like(tensor, value)
        for name in names
        for key, tensor in nn.Linear(4, 4).state_dict().items()
    }


def loaded_between_blocks(strategy: str, folder: Path) -> list[dict[str, Tensor]]:
    fabric, found = launch(strategy), []
    for first in ({"empty_init": True}, {"checkpoint": folder / "first.pt"}):
        for later in ("whole.pt", "part.pt"):
            with fabric.init_module(**first):
                model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model.load_state_dict(full_of(2, "0.", "1."))
            with fabric.init_module(checkpoint=folder / later, strict=False):
                model = nn.Sequential(model, nn.Linear(4, 4))
            found.append(weights(fabric.setup_module(model)))
            del found[-1]["1.weight"], found[-1]["1.bias"]
    return found


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_the_latest_load_wins_whichever_way_each_was_asked_for(strategy: str, tmp_path: Path) -> None:
    torch.save(full_of(1, "0.", "1."), tmp_path / "first.pt")
    torch.save(full_of(3, "0.0.", "0.1."), tmp_path / "whole.pt")
    torch.save(full_of(3, "0.1."), tmp_path / "part.pt")
    whole, part = full_of(3, "0.0.", "0.1."), full_of(2, "0.0.") | full_of(3, "0.1.")
    for found in run_ranks(2, loaded_between_blocks, strategy=strategy, folder=tmp_path):
        for weights_of, expected in zip(found, [whole, part, whole, part], strict=True):
            assert_same(weights_of, expected)
