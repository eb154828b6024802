"""Bytes on each rank. That a real run keeps as much, ``distributed/test_forecast.py`` shows."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fabric_init import forecast
from fabric_init.tools.forecast import Memory


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256, bias=False)
        self.down = nn.Linear(256, 64, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.layers = nn.ModuleList(Block() for _ in range(4))


ROOT, BLOCK = 128 * 64, 2 * 64 * 256
ALL = ROOT + 4 * BLOCK


def memory(**options: Any) -> Memory:
    return forecast(Model, **options).memory


def test_one_device_keeps_weights_gradients_and_states() -> None:
    found = memory()
    assert (found.weights, found.gradients, found.optimizer, found.masters) == (4 * ALL, 4 * ALL, 8 * ALL, 0)
    assert found.kept == found.peak == 16 * ALL


@pytest.mark.parametrize(("optimizer", "states"), [("adamw", 2), ("sgd-momentum", 1), ("sgd", 0)])
def test_states_are_the_optimizers(optimizer: str, states: int) -> None:
    assert memory(optimizer=optimizer, precision="bf16-true").optimizer == 2 * states * ALL


def test_without_training_there_are_weights_alone() -> None:
    found = memory(optimizer="none", strategy="ddp", devices=2)
    assert (found.weights, found.peak) == (4 * ALL, 4 * ALL)


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_fsdp_cuts_everything_and_gathers_units(strategy: str) -> None:
    found = memory(strategy=strategy, devices=4, precision="bf16-true", units=Block)
    assert found.weights == found.gradients == 2 * ALL // 4
    assert found.optimizer == 4 * ALL // 4
    assert found.passing == 4 * ROOT + 8 * BLOCK, "the root, one block at work and one on its way, with gradients"
    assert found.filling == (2 * BLOCK if strategy == "fsdp" else 0), "FSDP1 has a unit whole while it is filled"


def test_units_are_the_strategys_own_where_none_are_given() -> None:
    assert memory(strategy="fsdp2", devices=4) == memory(strategy="fsdp2", devices=4, units="blocks")
    assert memory(strategy="fsdp", devices=4).filling == 4 * ALL, "the model is the only unit"


def test_mixed_precision_keeps_fp32_and_computes_in_half() -> None:
    fsdp1 = memory(strategy="fsdp", devices=4, precision="bf16-mixed", units=Block)
    assert fsdp1.weights == fsdp1.gradients == 4 * ALL // 4
    assert fsdp1.passing == 4 * ROOT + 8 * BLOCK
    fsdp2 = memory(strategy="fsdp2", devices=4, precision="bf16-mixed", units=Block)
    assert fsdp2.weights == 4 * ALL // 4
    assert fsdp2.passing == 8 * ROOT + 16 * BLOCK + 2 * ALL, "torch.autocast keeps copies for the backward pass"


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_deepspeed_keeps_fp32_masters_and_cuts_by_stage(precision: str) -> None:
    stages = [memory(strategy=f"deepspeed_stage_{n}", devices=4, precision=precision) for n in (1, 2, 3)]
    assert [found.weights for found in stages] == [2 * ALL, 2 * ALL, 2 * ALL // 4]
    for found in stages:
        assert (found.masters, found.optimizer, found.gradients) == (4 * ALL // 4, 8 * ALL // 4, 2 * ALL // 4)
    assert stages[0].passing - stages[1].passing == 2 * ALL, "stage 1 has all gradients whole before it cuts them"


def test_frozen_parameters_need_no_gradients() -> None:
    def frozen() -> nn.Module:
        model = Model()
        model.layers.requires_grad_(False)
        return model

    found = forecast(frozen, strategy="ddp", devices=2).memory
    assert (found.weights, found.gradients, found.optimizer) == (4 * ALL, 4 * ROOT, 8 * ROOT)
