"""``FABRIC_INIT_VERIFY=1``: what a fill has read is compared with what the model holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, FabricInitError, deferred_init, materialize
from fabric_init.filling.monitoring.verify import VARIABLE
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.tensors import TensorInfo
from tests.support.ranks import run_ranks
from tests.support.zoo import assert_same, launch, weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)
        self.low = nn.Parameter(torch.randn(3, 3, dtype=torch.bfloat16))


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, "1")
    state = {**Model().state_dict(), "low": torch.full((3, 3), torch.nan)}
    torch.save(state, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def test_a_right_fill_passes(path: Path) -> None:
    with deferred_init():
        model = Model()
    materialize(model, checkpoint=path)
    assert torch.equal(model.body.weight, torch.load(path)["body.weight"])


def test_a_wrong_value_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = WholeTensors.put

    def wrong(self: WholeTensors, slot: TensorInfo, tensor: Tensor, value: Tensor) -> Tensor:
        return put(self, slot, tensor, value + 1 if slot.name == "body.bias" else value)

    monkeypatch.setattr(WholeTensors, "put", wrong)
    with deferred_init():
        model = Model()
    with pytest.raises(FabricInitError, match=r"1 loaded tensors do not have the values of .*m\.pt, .*: body\.bias"):
        materialize(model, checkpoint=path)


def on_ranks(path: Path, strategy: str) -> dict[str, Tensor]:
    fabric: Fabric = launch(strategy)
    with fabric.init_module(checkpoint=path):
        model = Model()
    return weights(fabric.setup(model))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_3"])
def test_every_strategy_passes(path: Path, strategy: str) -> None:
    expected = torch.load(path)["body.weight"]
    for rank in run_ranks(2, on_ranks, path=path, strategy=strategy):
        assert_same({"body.weight": rank["body.weight"]}, {"body.weight": expected})
