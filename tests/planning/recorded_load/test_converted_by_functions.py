"""``convert={"key": function}``: a function of the checkpoint's tensors makes the tensor of a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import CheckpointMismatchError, Fabric, deferred_init, materialize
from fabric_init.checkpoints import Fuse, Split
from tests.support.ranks import run_ranks
from tests.support.zoo import assert_same, launch, weights

STATE = {
    "up": torch.arange(8.0).view(4, 2),
    "down": torch.arange(6.0).view(3, 2),
    "offset": torch.ones(4),
    "other": torch.full((2, 4), 3.0),
}
FUNCTIONS: Mapping[str, Callable[[Mapping[str, Tensor]], Tensor]] = {
    "0.weight": lambda s: s["up"] @ s["down"].T,
    "0.bias": lambda s: s["offset"] * 0.5,
    "1.weight": lambda s: s["other"],
    "1.bias": lambda s: torch.cat([s["offset"][:1], s["other"].sum().view(1)]),
}
FUNCTIONS_OF_THE_REST = {key: function for key, function in FUNCTIONS.items() if key != "0.weight"}
EXPECTED = {
    "0.weight": STATE["up"] @ STATE["down"].T,
    "0.bias": torch.full((4,), 0.5),
    "1.weight": STATE["other"],
    "1.bias": torch.tensor([1.0, 24.0]),
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "m.pt")
    return tmp_path / "m.pt"


def loaded(path: Path, **options: Any) -> nn.Module:
    with deferred_init():
        built = model()
    materialize(built, checkpoint=path, **options)
    return built


def test_functions_make_the_tensors_and_take_what_they_use(path: Path) -> None:
    assert_same(loaded(path, convert=FUNCTIONS).state_dict(), EXPECTED)


def test_rename_is_applied_to_what_they_make(path: Path) -> None:
    functions = {key.replace("0.", "first."): function for key, function in FUNCTIONS.items()}
    assert_same(loaded(path, convert=functions, rename={r"^first\.": "0."}).state_dict(), EXPECTED)


def on_ranks(path: Path, strategy: str, io: str) -> dict[str, Tensor]:
    fabric: Fabric = launch(strategy, io=io)
    with fabric.init_module(checkpoint=path, convert=FUNCTIONS):
        built = model()
    return weights(fabric.setup(built))


@pytest.mark.parametrize(
    ("strategy", "io"),
    [("ddp", "local"), ("fsdp2", "local"), ("deepspeed_stage_3", "local"), ("fsdp2", "broadcast")],
)
def test_every_strategy_holds_what_they_make(path: Path, strategy: str, io: str) -> None:
    for rank in run_ranks(2, on_ranks, path=path, strategy=strategy, io=io):
        assert_same(rank, EXPECTED)


def test_a_key_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"m\.pt: convert=\{.*: '0\.bias' asks for 'nothing'"):
        loaded(path, convert={**FUNCTIONS, "0.bias": lambda s: s["nothing"]})


def test_what_the_model_does_not_have_is_an_error(path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"Not in the model \(1\):\n  2\.bias"):
        loaded(path, convert={**FUNCTIONS, "2.bias": lambda s: s["offset"]})


def test_a_key_that_is_there_already_is_an_error(path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match="it makes other, and the checkpoint has a tensor of that"):
        loaded(path, convert={"other": lambda s: s["up"]})


def test_a_result_that_is_no_tensor_is_an_error(path: Path) -> None:
    with pytest.raises(TypeError, match=r"convert\['0\.bias'\] returned float, not a tensor"):
        loaded(path, convert={**FUNCTIONS, "0.bias": lambda s: 3.0})


def test_functions_and_declarations_apply_in_order(path: Path) -> None:
    steps = [
        Fuse(["up", "down"], into="both"),
        {"halved": lambda s: s["both"] * 0.5},
        Split("halved", into=["0.weight", "down"], sizes=[4, 3]),
        FUNCTIONS_OF_THE_REST,
    ]
    expected = {**EXPECTED, "0.weight": STATE["up"] * 0.5}

    def narrow() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))

    with deferred_init():
        built = narrow()
    materialize(built, checkpoint=path, convert=steps, rename=lambda key: None if key == "down" else key)
    assert_same(built.state_dict(), expected)


def test_a_function_gives_a_scalar_a_dimension_and_takes_one_away(tmp_path: Path) -> None:
    torch.save({"one": torch.tensor(2.0), "matrix": torch.arange(6.0).view(1, 2, 3)}, tmp_path / "m.pt")
    reshaped = {"one": lambda s: s["one"].view(1), "matrix": lambda s: s["matrix"].squeeze(0)}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.matrix = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2, 3))

    with deferred_init():
        built = Model()
    materialize(built, checkpoint=tmp_path / "m.pt", convert=reshaped)
    assert_same(built.state_dict(), {"one": torch.tensor([2.0]), "matrix": torch.arange(6.0).view(2, 3)})
