"""One device: every tensor whole, on the strategy's device, and the strategy itself as Lightning made it."""

from __future__ import annotations

import lightning
import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import nn

from fabric_init import Fabric, deferred_init
from fabric_init.planning.tensors import find_tensors
from fabric_init.strategies import SingleDeviceStrategy as Ours


def test_tensors_are_whole_and_on_the_strategys_device_whatever_the_constructor_asked_for() -> None:
    with deferred_init():
        model = nn.Linear(2, 2, device="cuda")
    placement = Ours(torch.device("cpu")).placement(model)
    for slot, _ in find_tensors(model):
        assert placement.device(slot) == torch.device("cpu")
        assert placement.region(slot) is None


def test_the_strategy_is_lightnings_but_for_what_it_builds() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    assert type(fabric.strategy) is Ours
    assert isinstance(fabric.strategy, SingleDeviceStrategy)
    assert isinstance(fabric, lightning.Fabric)


def test_an_unchanged_lightning_fabric_still_does_what_it_did() -> None:
    torch.manual_seed(0)
    with lightning.Fabric(accelerator="cpu", devices=1).init_module(empty_init=True):
        model = nn.Linear(2, 2)
    assert not model.weight.is_meta
    assert not model._forward_pre_hooks
