"""From a strategy to its placement, and what is said of a strategy that has none."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import nn

from fabric_init import Fabric, FabricInitError
from fabric_init.filling.placement import WholeTensors
from fabric_init.strategies import placement as module
from fabric_init.strategies.placement import placement_of, register_placement


class Elsewhere(SingleDeviceStrategy):
    """A strategy of a user's own that nobody registered."""


def test_a_registered_strategy_gets_its_placement() -> None:
    assert isinstance(placement_of(SingleDeviceStrategy(torch.device("cpu"))), WholeTensors)


@pytest.mark.parametrize("options", [{"empty_init": True}, {"checkpoint": "anything.safetensors"}], ids=str)
def test_a_strategy_without_a_placement_is_refused_before_anything_is_built(options: dict) -> None:
    fabric = Fabric(accelerator="cpu", strategy=Elsewhere(torch.device("cpu")))
    built = []
    with pytest.raises(FabricInitError) as caught, fabric.init_module(**options):
        built.append(nn.Linear(2, 2))
    assert built == []
    for word in ("Elsewhere", "SingleDeviceStrategy", "init_module()", "register"):
        assert word in str(caught.value)
    with fabric.init_module():
        model = nn.Linear(2, 2)
    assert model(torch.ones(1, 2)).isfinite().all()


def test_registering_makes_models_of_a_strategy_fillable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_factories", dict(module._factories))
    register_placement(Elsewhere, lambda strategy: WholeTensors(strategy.root_device))
    fabric = Fabric(accelerator="cpu", strategy=Elsewhere(torch.device("cpu")))
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    fabric.init_missing(model)
    assert model(torch.ones(1, 2)).isfinite().all()
