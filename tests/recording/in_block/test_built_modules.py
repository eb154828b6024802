"""Which modules of a block are its models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fabric_init import Fabric, deferred_init
from fabric_init.errors import RecordingError, UninitializedTensorError
from fabric_init.recording.in_block.built_modules import BuiltModules


class Net(nn.Module):
    """Keeps another module without registering it."""

    def __init__(self, keep: Callable[[nn.Module, nn.Module], None] = lambda owner, kept: None) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        keep(self, nn.Conv1d(2, 2, 1))


def in_closure(owner: nn.Module, kept: nn.Module) -> None:
    owner.call = lambda x: kept(x)  # type: ignore[assignment]


KEPT: dict[str, Callable[[nn.Module, nn.Module], None]] = {
    "list": lambda owner, kept: setattr(owner, "convs", [kept]),
    "dict of lists": lambda owner, kept: setattr(owner, "convs", {"a": [kept]}),
    "object": lambda owner, kept: setattr(owner, "convs", SimpleNamespace(conv=kept)),
    "partial": lambda owner, kept: setattr(owner, "convs", functools.partial(kept)),
    "bound method": lambda owner, kept: setattr(owner, "convs", kept.forward),
    "closure": in_closure,
    "past __setattr__": lambda owner, kept: object.__setattr__(owner, "convs", kept),
}


@pytest.mark.parametrize("way", KEPT)
def test_a_module_that_its_owner_keeps_is_no_second_model(way: str) -> None:
    with BuiltModules() as built:
        model = Net(KEPT[way])
    assert built.roots() == [model]


def test_a_model_with_a_kept_module_is_loaded_and_the_kept_one_has_its_own_init(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(checkpoint=tmp_path / "net.pt"):
        model = Net(KEPT["list"])
    assert torch.equal(model.body.weight, torch.load(tmp_path / "net.pt")["body.weight"])
    kept = model.convs[0]  # type: ignore[union-attr]
    assert kept(torch.ones(1, 2, 3)).isfinite().all()  # type: ignore[operator]


def test_a_loss_without_tensors_in_a_dict_is_no_second_model(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    with Fabric(accelerator="cpu", devices=1).init_module(checkpoint=tmp_path / "net.pt"):
        model = Net(lambda owner, kept: setattr(owner, "losses", {"label": nn.CrossEntropyLoss()}))
    assert torch.equal(model.body.weight, torch.load(tmp_path / "net.pt")["body.weight"])


def test_two_models_that_know_each_other_are_two(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    with (
        pytest.raises(RecordingError, match="2 models were built"),
        Fabric(accelerator="cpu", devices=1).init_module(checkpoint=tmp_path / "net.pt"),
    ):
        student, teacher = Net(), Net()
        student.other, teacher.other = [teacher], [student]  # type: ignore[assignment]


def copy_of_one_that_is_gone() -> list[nn.Module]:
    return [copy.deepcopy(Net())]


def copy_inside_a_model() -> list[nn.Module]:
    return [nn.Sequential(copy.deepcopy(nn.Sequential(nn.ReLU(), Net())), nn.Linear(4, 4))]


def model_and_its_copy() -> list[nn.Module]:
    model = Net()
    return [model, copy.deepcopy(model)]


def copies_in_a_list() -> list[nn.Module]:
    return list(copy.deepcopy([Net(), Net()]))


COPIES = {copy_of_one_that_is_gone: 1, copy_inside_a_model: 1, model_and_its_copy: 1, copies_in_a_list: 2}


@pytest.mark.parametrize("build", COPIES, ids=lambda build: build.__name__)
def test_a_deep_copy_is_a_model_if_what_it_is_a_copy_of_is_gone(build: Callable[[], list[nn.Module]]) -> None:
    with BuiltModules() as built, deferred_init():
        made = build()
    assert built.roots() == made[: COPIES[build]]


def test_a_deep_copy_is_loaded_and_waits_for_that(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    with fabric.init_module(checkpoint=tmp_path / "net.pt"):
        model = copy.deepcopy(Net())
    assert torch.equal(model.body.weight, torch.load(tmp_path / "net.pt")["body.weight"])
    with fabric.init_module(empty_init=True):
        model = copy.deepcopy(Net())
    with pytest.raises(UninitializedTensorError, match=r"  body\.weight"):
        model.body(torch.ones(1, 4))


def test_a_model_dropped_in_a_reference_cycle_does_not_count() -> None:
    with BuiltModules() as built, deferred_init():
        dropped = Net()
        dropped.itself = [dropped]  # type: ignore[assignment]
        del dropped
        kept = Net()
    assert built.roots() == [kept]
