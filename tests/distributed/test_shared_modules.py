"""Models that share a module, each with its own checkpoint; a part of one model that is built into another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, FabricInitError
from tests.support.ranks import run_ranks
from tests.support.zoo import launch, weights

State = dict[str, Tensor]


class Model(nn.Module):
    def __init__(self, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) if shared is None else shared
        self.own = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.shared(x))


class Both(nn.Module):
    """Two models, as entries of one list: FSDP2 would make units of them if they did not share anything."""

    def __init__(self, *models: Model) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return self.models[0](x) + self.models[1](x)


def write(folder: Path) -> None:
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        torch.save(Model().state_dict(), folder / f"{name}.pt")
    own = {key: value for key, value in torch.load(folder / "second.pt").items() if key.startswith("own.")}
    torch.save(own, folder / "own.pt")


def part(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key.startswith(f"{name}.")}


def same(model: nn.Module, expected: State) -> None:
    found = weights(model)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


def build(fabric: Fabric, folder: Path, second: str) -> tuple[Model, Model, State, State]:
    """Two models that share a module, and what they have to hold: the later load wins."""
    one, other = torch.load(folder / "first.pt"), torch.load(folder / "second.pt")
    with fabric.init_module(checkpoint=folder / "first.pt"):
        first = Model()
    with fabric.init_module(checkpoint=folder / f"{second}.pt", strict=second != "own"):
        model = Model(first.shared)
    shared = part(other if second == "second" else one, "shared")
    return first, model, part(one, "own") | shared, part(other, "own") | shared


def together(fabric: Fabric, folder: Path) -> None:
    for second in ("second", "own"):
        first, model, one, other = build(fabric, folder, second)
        both = fabric.setup(Both(first, model))
        expected = {f"models.0.{key}": value for key, value in one.items()}
        same(both, expected | {f"models.1.{key}": value for key, value in other.items()})
        both(torch.ones(2, 4))


def apart(fabric: Fabric, folder: Path) -> None:
    for second in ("second", "own"):
        for swapped in (False, True):
            first, model, one, other = build(fabric, folder, second)
            pairs = [(first, one), (model, other)][:: -1 if swapped else 1]
            done = [(fabric.setup(pairs[0][0]), pairs[0][1])]
            if fabric.strategy.fills_in_setup:
                with pytest.raises(FabricInitError, match=r"shared\.0\.weight was sharded by an earlier setup.*as one"):
                    fabric.setup(pairs[1][0])
            else:
                done.append((fabric.setup(pairs[1][0]), pairs[1][1]))
            for found, expected in done:
                same(found, expected)


def taken_out(fabric: Fabric, folder: Path) -> None:
    one, other = torch.load(folder / "first.pt"), torch.load(folder / "second.pt")
    for options in ({"empty_init": True}, {"checkpoint": folder / "own.pt", "strict": False}):
        with fabric.init_module(checkpoint=folder / "first.pt"):
            first = Model()
        shared = first.shared
        del first
        with fabric.init_module(**options):
            model = Model(shared)
        model = fabric.setup(model)
        fabric.init_missing(model)
        found = weights(model)
        assert all(torch.equal(found[key], value) for key, value in part(one, "shared").items())
        if "checkpoint" in options:
            same(model, part(one, "shared") | part(other, "own"))


def all_of_it(strategy: str, folder: Path) -> None:
    fabric = launch(strategy)
    together(fabric, folder)
    apart(fabric, folder)
    taken_out(fabric, folder)


@pytest.mark.parametrize(("strategy", "ranks"), [("auto", 1), ("ddp", 2), ("fsdp2", 2), ("deepspeed_stage_3", 2)])
def test_shared_modules_are_right_or_refused(strategy: str, ranks: int, tmp_path: Path) -> None:
    write(tmp_path)
    run_ranks(ranks, all_of_it, strategy=strategy, folder=tmp_path)


class Repeated(nn.Module):
    """The same layers several times, as in ALBERT, beside layers that are there once."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.layers = nn.ModuleList([block, block, nn.Sequential(nn.Linear(4, 4), block)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def repeat(path: Path) -> None:
    fabric = launch("fsdp2")
    with fabric.init_module(checkpoint=path):
        model = Repeated()
    model = fabric.setup(model)
    same(model, torch.load(path))
    model(torch.ones(2, 4)).sum().backward()


def test_a_block_that_occurs_several_times_is_sharded_once(tmp_path: Path) -> None:
    torch.save(Repeated().state_dict(), tmp_path / "model.pt")
    run_ranks(2, repeat, path=tmp_path / "model.pt")
