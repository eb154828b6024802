"""A strategy of somebody else's, in our Fabric and in Lightning's, and what is said of one that cannot do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import nn

from fabric_init import Fabric, FabricInitError, UninitializedTensorError, init_missing, init_report
from fabric_init import strategies as ours
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.strategies import DeferredInitMixin, register_strategy, registry


class Elsewhere(SingleDeviceStrategy):
    """A strategy of a user's own that nobody registered."""


class ElsewhereRecorded(DeferredInitMixin, Elsewhere):
    def placement(self, model: nn.Module) -> Placement:
        return WholeTensors(self.root_device)


def elsewhere(kind: type[Elsewhere] = Elsewhere) -> Any:
    return kind(torch.device("cpu"), None)


@pytest.mark.parametrize("options", [{"empty_init": True}, {"checkpoint": "anything.safetensors"}], ids=str)
def test_a_strategy_that_says_nothing_of_its_tensors_is_refused_before_anything_is_built(options: dict) -> None:
    fabric = Fabric(accelerator="cpu", strategy=elsewhere())
    built = []
    with pytest.raises(FabricInitError) as caught, fabric.init_module(**options):
        built.append(nn.Linear(2, 2))
    assert built == []
    for word in ("Elsewhere", "SingleDeviceStrategy", "init_module()", "register"):
        assert word in str(caught.value)
    with fabric.init_module():
        model = nn.Linear(2, 2)
    assert model(torch.ones(1, 2)).isfinite().all()


def test_a_registered_strategy_stands_in_for_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_instead", dict(registry._instead))
    register_strategy(ElsewhereRecorded, instead_of=Elsewhere)
    strategy = elsewhere()
    fabric = Fabric(accelerator="cpu", strategy=strategy)
    assert fabric.strategy is strategy
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    fabric.init_missing(model)
    assert model(torch.ones(1, 2)).isfinite().all()


def test_a_strategy_that_forgot_to_say_where_tensors_live_is_told_so() -> None:
    class Forgetful(DeferredInitMixin, SingleDeviceStrategy):
        pass

    fabric = Fabric(accelerator="cpu", strategy=Forgetful(torch.device("cpu")))
    kept = []
    with (
        pytest.raises(NotImplementedError, match=r"Forgetful .* override placement"),
        fabric.init_module(empty_init=True),
    ):
        kept.append(nn.Linear(2, 2))


def test_how_ranks_read_is_the_strategys_to_say_or_fabrics() -> None:
    for given, expected in (("auto", "broadcast"), ("local", "local")):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=ours.FSDP2Strategy(io="broadcast"), io=given)
        assert fabric.strategy.io == expected
    assert Fabric(accelerator="cpu", devices=2, strategy="ddp", io="broadcast").strategy.io == "broadcast"
    for make in (lambda: ours.DDPStrategy(io="fast"), lambda: Fabric(accelerator="cpu", io="fast")):
        with pytest.raises(ValueError, match=r"io='fast': give 'local' .* 'broadcast'"):
            make()


# -- in an unchanged lightning.Fabric ----------------------------------------------------------------------------------


@pytest.fixture(params=["ours", "somebody else's"])
def plain(request: pytest.FixtureRequest) -> lightning.Fabric:
    kinds: dict[str, Any] = {
        "ours": ours.SingleDeviceStrategy(torch.device("cpu")),
        "somebody else's": elsewhere(ElsewhereRecorded),
    }
    return lightning.Fabric(accelerator="cpu", strategy=kinds[request.param])


def test_empty_init_has_the_guarantee_in_lightnings_fabric(plain: lightning.Fabric) -> None:
    with plain.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    wrapped = plain.setup(model)
    with pytest.raises(UninitializedTensorError, match=r"1\.bias"):
        wrapped(torch.ones(1, 2))
    assert not init_report(wrapped).complete
    init_missing(wrapped)
    assert init_report(wrapped).complete
    assert wrapped(torch.ones(1, 2)).isfinite().all()


def test_a_load_completes_the_model_in_lightnings_fabric(plain: lightning.Fabric, tmp_path: Path) -> None:
    saved = nn.Linear(2, 2)
    torch.save(saved.state_dict(), tmp_path / "raw.pt")
    plain.save(tmp_path / "state.ckpt", {"model": saved})
    for load in (
        lambda model: plain.load_raw(tmp_path / "raw.pt", model),
        lambda model: plain.load(tmp_path / "state.ckpt", {"model": model}),
    ):
        with plain.init_module(empty_init=True):
            model = nn.Linear(2, 2)
        load(model)
        assert torch.equal(model.weight, saved.weight)
        assert {row.status for row in init_report(model).rows} == {"loaded"}


def test_without_empty_init_lightnings_fabric_builds_as_ever(plain: lightning.Fabric) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(3, 3)
    for options in ({}, {"empty_init": False}, {"empty_init": None}):
        torch.manual_seed(0)
        with plain.init_module(**options):
            model = nn.Linear(3, 3)
        assert torch.equal(model.weight, expected.weight)
