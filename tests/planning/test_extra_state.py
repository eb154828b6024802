"""Extra state (``get_extra_state``) of a checkpoint: what ``load_state_dict`` would do with it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import CheckpointMismatchError, Fabric, deferred_init, materialize
from fabric_init.checkpoints import Part, Transpose
from tests.support.dcp_writers import save_alone
from tests.support.ranks import run_ranks
from tests.support.zoo import assert_same, launch, weights


class Counting(nn.Module):
    """Keeps what no tensor holds, as layers of 8 bits keep their scales."""

    def __init__(self, extra: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Model(nn.Module):
    def __init__(self, *extra: Any) -> None:
        super().__init__()
        first, second = extra or (None, None)
        self.first, self.second = Counting(first), Counting(second)
        self.plain = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.second(self.first(x)))


PLAIN = {"scale": 2, "history": {"amax": torch.arange(3.0)}}


def saved_model() -> Model:
    torch.manual_seed(3)
    return Model(PLAIN, torch.arange(5.0))


def right(model: nn.Module) -> None:
    first, second = model.get_submodule("first"), model.get_submodule("second")
    assert isinstance(first, Counting)
    assert isinstance(second, Counting)
    assert first.extra.keys() == PLAIN.keys()
    assert first.extra["scale"] == 2
    assert torch.equal(first.extra["history"]["amax"], torch.arange(3.0))
    assert torch.equal(second.extra, torch.arange(5.0))


def legacy(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def distributed(state: dict[str, Any], path: Path) -> None:
    save_alone(state, path)


SAVES = pytest.mark.parametrize("save", [torch.save, legacy, distributed])


@SAVES
@pytest.mark.parametrize("strict", [True, False])
def test_it_is_set_on_one_device(tmp_path: Path, save: Callable[..., None], strict: bool) -> None:
    save(saved_model().state_dict(), tmp_path / "model.pt")
    with deferred_init():
        model = Model()
    materialize(model, checkpoint=tmp_path / "model.pt", strict=strict)
    right(model)
    with Fabric(accelerator="cpu", devices=1).init_module(checkpoint=tmp_path / "model.pt", strict=strict):
        model = Model()
    right(model)


def test_it_is_renamed_and_taken_in_parts_as_tensors_are(tmp_path: Path) -> None:
    torch.save({f"net.{key}": value for key, value in saved_model().state_dict().items()}, tmp_path / "model.pt")
    for options in ({"rename": Part("net.")}, {"rename": {"^net.": ""}}, {"rename": Part("net."), "convert": []}):
        with deferred_init():
            model = Model()
        materialize(model, checkpoint=tmp_path / "model.pt", **options)
        right(model)
    with deferred_init():
        model = Model()
    transposed = Transpose(["net.plain.weight"])
    materialize(model, checkpoint=tmp_path / "model.pt", rename=Part("net."), convert=[transposed])
    right(model)


def test_missing_and_unexpected_extra_state_follows_strict(tmp_path: Path) -> None:
    state = saved_model().state_dict()
    path = tmp_path / "model.pt"
    for changed, problem in (
        ({key: value for key, value in state.items() if key != "first._extra_state"}, "Missing"),
        (state | {"plain._extra_state": {"a": 1}}, "Not in the model"),
        (state | {"plain._extra_state": torch.ones(1)}, "Not in the model"),
    ):
        torch.save(changed, path)
        with deferred_init():
            model = Model()
        with pytest.raises(RuntimeError, match="_extra_state"):
            Model().load_state_dict(changed)
        with pytest.raises(CheckpointMismatchError, match=rf"{problem}.*\n.*_extra_state"):
            materialize(model, checkpoint=path)
        report = materialize(model, checkpoint=path, strict=False)
        assert torch.equal(model.second.extra, torch.arange(5.0))
        assert model.first.extra is None or problem == "Not in the model"
        assert report.unexpected == (("plain._extra_state",) if problem == "Not in the model" else ())
        path.unlink()


def test_a_format_of_tensors_alone_has_the_tensors_among_it(tmp_path: Path) -> None:
    tensors = {key: value for key, value in saved_model().state_dict().items() if isinstance(value, Tensor)}
    save_file(tensors, tmp_path / "model.safetensors")
    with deferred_init():
        model = Model()
    with pytest.raises(CheckpointMismatchError, match=r"Missing from the checkpoint \(1\):\n  first\._extra_state"):
        materialize(model, checkpoint=tmp_path / "model.safetensors")
    materialize(model, checkpoint=tmp_path / "model.safetensors", strict=False)
    assert torch.equal(model.second.extra, torch.arange(5.0))


def on_ranks(strategy: str, io: Any, folder: Path) -> None:
    fabric = launch(strategy, io=io)
    expected = weights(saved_model())
    for name in ("model.pt", "folder"):
        if strategy != "fsdp2" and name == "folder":
            continue
        with fabric.init_module(checkpoint=folder / name):
            model = Model()
        assert_same(weights(fabric.setup(model)), expected)
        right(model)
    with fabric.init_module(checkpoint=folder / "model.pt"):
        inside = Model()
    with fabric.init_module(empty_init=True):
        outside = nn.Sequential(inside, nn.Linear(4, 2))
    fabric.setup(outside)
    right(inside)
    with fabric.init_module(checkpoint=folder / "model.pt"):
        model = Model()
    model.load_state_dict(Model("later", "later").state_dict())
    fabric.setup(model)
    assert (model.first.extra, model.second.extra) == ("later", "later")


@pytest.mark.parametrize(
    ("strategy", "io"), [("fsdp2", "local"), ("fsdp2", "broadcast"), ("deepspeed_stage_3", "local"), ("ddp", "local")]
)
def test_it_is_set_on_every_rank(tmp_path: Path, strategy: str, io: str) -> None:
    torch.save(saved_model().state_dict(), tmp_path / "model.pt")
    distributed(saved_model().state_dict(), tmp_path / "folder")
    run_ranks(2, on_ranks, strategy=strategy, io=io, folder=tmp_path)
