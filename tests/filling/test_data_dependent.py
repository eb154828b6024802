"""What Python sees of weights in a constructor is what it would see of those in the checkpoint, or it is an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.recording.tape.tape import Rng
from tests.support.ranks import run_ranks
from tests.support.zoo import launch, weights

FIX = "build the model in one init_module block, and change it in another"


class Model(nn.Module):
    """A layer, a norm, buffers, and what ``look`` sees of them."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("positions", torch.arange(4))
        self.seen = look(self)


def without_looking(model: Any) -> None:
    pass


def file_of(folder: Path) -> Path:
    """Write a checkpoint with larger weights, of a model that has been trained."""
    state = Model(without_looking).state_dict()
    state["layer.weight"] = torch.linspace(-100, 100, 16).view(4, 4)
    state["norm.weight"] = torch.full((4,), 3.0)
    state["initialized"] = torch.tensor(True)
    torch.save(state, folder / "m.pt")
    return folder / "m.pt"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return file_of(tmp_path)


def load(look: Callable[[Any], Any], file: Path, rng: Rng = "per_op") -> Model:
    with deferred_init(rng=rng):
        model = Model(look)
    materialize(model, checkpoint=file)
    assert torch.equal(model.layer.weight, torch.load(file)["layer.weight"])
    return model


def factors(weight: Tensor) -> Tensor:
    return torch.linalg.svd(weight.detach())[1]


def copied_out(model: Any) -> Tensor:
    with torch.device("cpu"):
        return OUTSIDE.copy_(model.layer.weight.detach())


OUTSIDE = torch.zeros(4, 4)
DECIDES: dict[str, Callable[[Any], Any]] = {
    "item": lambda model: model.layer.weight.abs().max().item(),
    "float": lambda model: float(model.layer.weight.detach().std()),
    "int": lambda model: int(model.layer.weight.detach().abs().sum()),
    "bool": lambda model: bool((model.layer.weight.abs() > 50).any()),
    "tolist": lambda model: model.layer.weight[0].tolist(),
    "numpy": lambda model: model.layer.weight.detach().numpy().copy(),
    "numpy of what is computed": lambda model: factors(model.layer.weight).numpy().copy(),
    "nonzero": lambda model: torch.nonzero(model.layer.weight.detach() > 1),
    "index by a mask": lambda model: model.layer.weight.detach()[model.layer.weight.detach() > 1],
    "equal": lambda model: torch.equal(model.layer.weight > 50, torch.zeros(4, 4, dtype=torch.bool)),
    "torch.tensor": lambda model: torch.tensor([model.layer.weight.max(), 0.0]),
    "pickle": lambda model: pickle.dumps(model.layer.weight),
    "a tensor of before the block": copied_out,
    "bias, too": lambda model: (model.layer.weight.sum() + model.layer.bias.sum()).item(),
}


@pytest.mark.parametrize("name", DECIDES)
def test_what_would_be_seen_otherwise_is_an_error(name: str, file: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=FIX) as refused:
        load(DECIDES[name], file)
    assert "computed from layer.weight" in str(refused.value)
    assert "test_data_dependent.py:" in str(refused.value)


def asserts(model: Any) -> None:
    assert not torch.isnan(model.layer.weight).any()
    assert torch.isfinite(model.layer.weight).all().item()
    assert not torch.equal(model.layer.weight[0], model.norm.weight)
    assert not torch.allclose(model.layer.weight[0], model.norm.weight)
    if (model.layer.weight == 0).all():
        nn.init.ones_(model.layer.weight)


def prints(model: Any) -> str:
    return f"{model.layer.weight} {model.layer.weight.mean():.3f} {model.layer.weight!r} {model.layer.weight.sum()}"


def own_choices(model: Any) -> tuple[Any, ...]:
    assert not model.initialized
    assert model.norm.weight.sum() == 4
    rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
    return rates, len(set(model.positions.tolist())), torch.randn(3).tolist()


def rejection(model: Any) -> None:
    with torch.no_grad():
        while (model.layer.weight.abs() > 0.1).any():
            model.layer.weight[model.layer.weight.abs() > 0.1] = torch.rand(1).item() * 0.1


def scaled_by_its_own(model: Any) -> None:
    model.layer.weight.data.div_(model.layer.weight.data.norm().item())


def library(model: Any) -> None:
    with torch.no_grad():
        nn.init.trunc_normal_(model.layer.weight)
        nn.init.sparse_(model.layer.weight, 0.5)
        nn.init.orthogonal_(model.layer.weight)


@pytest.mark.parametrize("rng", ["per_op", "eager"])
@pytest.mark.parametrize("look", [asserts, prints, own_choices, rejection, scaled_by_its_own, library])
def test_what_would_be_seen_alike_or_is_the_models_own_choice_is_none(
    look: Callable[[Any], Any], rng: Rng, file: Path
) -> None:
    load(look, file, rng)


def test_printing_does_not_keep_the_load_from_what_is_computed_afterwards(file: Path) -> None:
    class Printing(Model):
        def __init__(self) -> None:
            super().__init__(prints)
            self.register_buffer("norms", self.layer.weight.detach().norm(dim=1), persistent=False)

    with deferred_init():
        model: Any = Printing()
    materialize(model, checkpoint=file)
    assert torch.equal(model.norms, torch.load(file)["layer.weight"].norm(dim=1))


def test_a_look_at_what_the_checkpoint_does_not_bring_is_none(file: Path) -> None:
    state = {name: value for name, value in torch.load(file).items() if not name.startswith("layer")}
    torch.save(state, file)
    with deferred_init():
        model = Model(DECIDES["item"])
    materialize(model, checkpoint=file, strict=False)
    assert model.seen == model.layer.weight.abs().max().item()


def test_a_look_is_none_without_a_checkpoint_or_before_load_state_dict(file: Path) -> None:
    with deferred_init():
        model = Model(DECIDES["item"])
    materialize(model)
    assert model.seen == model.layer.weight.abs().max().item()
    model.load_state_dict(torch.load(file))


def test_a_checkpoint_of_the_same_values_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        first = Model(DECIDES["numpy of what is computed"])
    materialize(first)
    torch.save(first.state_dict(), tmp_path / "m.pt")
    torch.manual_seed(0)
    assert (load(DECIDES["numpy of what is computed"], tmp_path / "m.pt", "eager").seen == first.seen).all()


def test_what_is_computed_of_the_checkpoint_may_fail(file: Path) -> None:
    def picks(model: Any) -> Any:
        at = (model.layer.weight.detach()[0] * 10).long().abs().clamp(max=200)
        return torch.arange(50)[at].sum().item()

    with pytest.raises(CheckpointMismatchError, match=FIX):
        load(picks, file)


class Cut(nn.Module):
    """Parameters that are parts of what a larger tensor was cast to, and what Python sees of one of these."""

    def __init__(self, look: str) -> None:
        super().__init__()
        w = torch.randn(4, 4)
        cast = w.half()
        self.left, self.right = map(nn.Parameter, cast.chunk(2))
        self.seen = {"the whole": w, "the cast": cast, "a part": self.right.detach()}[look].max().item()


@pytest.mark.parametrize("look", ["the whole", "the cast", "a part"])
@pytest.mark.parametrize("lacks", [None, "left", "right"])
def test_what_is_seen_of_tensors_that_are_loaded_in_parts_is_checked(
    look: str, lacks: str | None, tmp_path: Path
) -> None:
    state = {"left": torch.full((2, 4), 100.0), "right": torch.full((2, 4), 200.0)}
    torch.save({name: value for name, value in state.items() if name != lacks}, tmp_path / "m.pt")
    with deferred_init():
        model = Cut(look)
    if look == "a part" and lacks == "right":
        materialize(model, checkpoint=tmp_path / "m.pt", strict=False)
        assert model.seen == model.right.max().item()
        return
    with pytest.raises(CheckpointMismatchError, match=FIX) as refused:
        materialize(model, checkpoint=tmp_path / "m.pt", strict=False)
    assert f"computed from {'right' if lacks == 'left' else 'left'}" in str(refused.value)


def on_this_rank(strategy: str, folder: Path) -> list[str]:
    found = []
    for name in ("item", "numpy of what is computed"):
        fabric = launch(strategy)
        try:
            with fabric.init_module(checkpoint=folder / "m.pt"):
                model = Model(DECIDES[name])
            fabric.setup(model)
            found.append("loaded")
        except CheckpointMismatchError as error:
            found.append(str(error))
    return found


STRATEGIES = ["ddp", "fsdp", "fsdp2", "deepspeed_stage_3"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_refuse(strategy: str, tmp_path: Path) -> None:
    file_of(tmp_path)
    for found in run_ranks(2, on_this_rank, strategy=strategy, folder=tmp_path):
        assert all(FIX in text for text in found), found


def loads_on_this_rank(strategy: str, file: Path) -> dict[str, Tensor]:
    fabric = launch(strategy)
    with fabric.init_module(checkpoint=file):
        model: Any = Model(asserts)
    with fabric.init_module(empty_init=True):
        model.largest = nn.Parameter(torch.full((1,), model.layer.weight.detach().abs().max().item()))
    fabric.init_missing(model)
    return weights(fabric.setup(model))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_load_what_would_be_seen_alike(strategy: str, file: Path) -> None:
    for found in run_ranks(2, loads_on_this_rank, strategy=strategy, file=file):
        assert torch.equal(found["layer.weight"], torch.load(file)["layer.weight"])
        assert found["largest"] == 100.0
