"""Parameters are parts of what a larger tensor was converted to, and code computes from that larger one as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, deferred_init, materialize
from fabric_init.errors import RecordingError
from tests.support.ranks import run_ranks
from tests.support.zoo import launch, weights

Cut = Callable[[Tensor], Mapping[str, Tensor]]


def _named(*parts: Tensor) -> dict[str, Tensor]:
    return {f"p{number}": part for number, part in enumerate(parts)}


CUTS: dict[str, Cut] = {
    "the parts of a cast": lambda w: _named(*w.to(torch.bfloat16).chunk(2)),
    "columns of a cast": lambda w: _named(*w.half().split([2, 4], 1)),
    "a part of a cast": lambda w: _named(w.half()[1:3]),
    "all of a cast, as a view": lambda w: _named(w.half().view(-1)),
    "rows of a transposed cast": lambda w: _named(*w.half().t().chunk(3)),
    "rows of a cast of the transposed": lambda w: _named(*w.t().half().chunk(2)),
    "parts of a part": lambda w: _named(*w[1:, 1:].half().chunk(3)),
    "parts of a cast of a cast": lambda w: _named(*w.double().half().chunk(2)),
    "a part of each of two casts": lambda w: _named(w[:1].half(), w.double()[1:]),
    "casts of parts": lambda w: _named(*(part.half() for part in w.chunk(2))),
    "rows of the transposed in its own memory": lambda w: _named(*w.t().contiguous().chunk(2)),
    "a flat view of the transposed": lambda w: _named(w.t().contiguous().view(-1)[4:16]),
    "heads": lambda w: _named(*w.half().view(2, 2, 2, 3).transpose(1, 2).unbind(2)),
    "the parts of a reshaped part": lambda w: _named(*w[:, :3].reshape(6, 2).chunk(2)),
    "a part of a cast on which nothing else is": lambda w: _named(w.half()[:, 2]),
}


class Derived(nn.Module):
    """Parameters cut out of a tensor, and what was computed from that tensor before."""

    def __init__(self, cut: Cut, w: Tensor) -> None:
        super().__init__()
        for name, part in cut(w).items():
            self.register_parameter(name, nn.Parameter(part))
        self.register_buffer("saved", w * 2)
        self.register_buffer("unsaved", w + 1, persistent=False)
        self.norms = w.norm(dim=1)
        self.itself = w
        product = w * 3
        self.kept: Callable[[], Tensor] = lambda: product


def example(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return what a checkpoint brings, and the larger tensor that it brings thereby; NaN where it brings nothing."""
    places = CUTS[name](torch.arange(24.0).view(4, 6))
    whole = torch.full((24,), float("nan"))
    for part in places.values():
        whole[part.long()] = 100 + part.float()
    return {key: 100 + part.float() for key, part in places.items()}, whole.view(4, 6)


def check(found: Mapping[str, Tensor], state: Mapping[str, Tensor], whole: Tensor) -> None:
    assert all(torch.equal(found[name].float(), value) for name, value in state.items())
    brought = ~whole.isnan()
    itself = found["itself"]
    assert torch.equal(itself[brought], whole[brought])
    assert (itself[~brought].abs() < 10).all()  # drawn
    assert torch.equal(found["saved"], itself * 2)
    assert torch.equal(found["unsaved"], itself + 1)
    assert torch.equal(found["kept"], itself * 3)
    torch.testing.assert_close(found["norms"], itself.norm(dim=1))


def held(model: nn.Module, module: Any) -> dict[str, Tensor]:
    beside = {"unsaved": module.unsaved, "norms": module.norms, "itself": module.itself, "kept": module.kept()}
    return {**weights(model), **{name: value.detach().clone() for name, value in beside.items()}}


@pytest.mark.parametrize("name", CUTS)
def test_what_is_computed_from_the_larger_tensor_follows_the_load_of_its_parts(name: str, tmp_path: Path) -> None:
    state, whole = example(name)
    torch.save(state, tmp_path / "m.pt")
    with deferred_init():
        model = Derived(CUTS[name], torch.randn(4, 6))
    materialize(model, checkpoint=tmp_path / "m.pt", strict=False)
    check(held(model, model), state, whole)


def on_ranks(path: Path, strategy: str, name: str) -> dict[str, Tensor]:
    fabric: Fabric = launch(strategy)
    with fabric.init_module(checkpoint=path, strict=False):
        model = nn.Sequential(Derived(CUTS[name], torch.randn(4, 6)))
    model = fabric.setup(model)
    found = held(model, model.module[0])
    return {key.removeprefix("0."): value for key, value in found.items()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2", "deepspeed_stage_3"])
@pytest.mark.parametrize("name", ["the parts of a cast", "casts of parts"])
def test_so_it_does_on_every_strategy(name: str, strategy: str, tmp_path: Path) -> None:
    state, whole = example(name)
    torch.save({f"0.{key}": value for key, value in state.items()}, tmp_path / "m.pt")
    for found in run_ranks(2, on_ranks, path=tmp_path / "m.pt", strategy=strategy, name=name):
        check(found, state, whole)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        w = torch.randn(4)
        self.one, self.other = nn.Parameter(w.half()), nn.Parameter(w.double())
        self.doubled = w * 2


@pytest.mark.parametrize("by", [0.0, 1.0])
def test_what_is_computed_from_a_tensor_that_was_cast_twice_needs_one_value(by: float, tmp_path: Path) -> None:
    value = torch.arange(4.0)
    torch.save({"one": value, "other": value + by}, tmp_path / "m.pt")
    with deferred_init():
        model = Twice()
    if by:
        with pytest.raises(RecordingError, match="converted more than once"):
            materialize(model, checkpoint=tmp_path / "m.pt")
    else:
        materialize(model, checkpoint=tmp_path / "m.pt")
        assert torch.equal(model.doubled, value * 2)


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.randn(4))
        self.cast = nn.Parameter(self.whole.detach().half())
        self.doubled = self.whole.detach() * 2


def test_a_parameter_of_its_own_is_not_what_was_cast_from_it(tmp_path: Path) -> None:
    torch.save({"cast": torch.full((4,), 100.0)}, tmp_path / "m.pt")
    with deferred_init():
        model = Halved()
    materialize(model, checkpoint=tmp_path / "m.pt", strict=False)
    assert torch.equal(model.cast.float(), torch.full((4,), 100.0))
    assert (model.whole < 10).all()
    assert torch.equal(model.doubled, model.whole * 2)


class Following(nn.Module):
    """Parts of what is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Parameter(torch.randn(4))
        self.left, self.right = map(nn.Parameter, (self.source.detach() * 2).chunk(2))


def following(path: Path, strategy: str) -> dict[str, Tensor]:
    fabric: Fabric = launch(strategy)
    with fabric.init_module(checkpoint=path, strict=False):
        model = Following()
    return weights(fabric.setup(model))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2", "deepspeed_stage_3"])
def test_a_part_that_is_not_loaded_is_computed_from_what_is(strategy: str, tmp_path: Path) -> None:
    torch.save({"source": torch.arange(4.0), "left": torch.full((2,), 100.0)}, tmp_path / "m.pt")
    for found in run_ranks(2, following, path=tmp_path / "m.pt", strategy=strategy):
        assert found["left"].tolist() == [100.0, 100.0]
        assert found["right"].tolist() == [4.0, 6.0]


class Overlapping(nn.Module):
    """Tensors that share memory, of which a file may have different values."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.all, self.row = nn.Parameter(w), nn.Parameter(w[0])
        self.register_buffer("again", w)
        cast = w.half()
        self.cast, self.part = nn.Parameter(cast), nn.Parameter(cast[:1])
        turned = torch.zeros(2, 3) + w.detach()
        self.first, self.second = map(nn.Parameter, (turned.half(), turned.half()[1:]))
        self.doubled = turned * 2


def test_of_tensors_that_share_memory_the_last_one_counts_as_in_plain_pytorch(tmp_path: Path) -> None:
    plain = Overlapping(torch.zeros(2, 3))
    state = {name: torch.full(value.shape, float(at)) for at, (name, value) in enumerate(plain.state_dict().items(), 1)}
    state["second"] = state["first"][1:].clone()
    torch.save(state, tmp_path / "m.pt")
    plain.load_state_dict(state)
    with deferred_init():
        model = Overlapping(torch.zeros(2, 3))
    materialize(model, checkpoint=tmp_path / "m.pt")
    expected = plain.state_dict()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])} == set()
    assert torch.equal(model.doubled, state["first"] * 2)
