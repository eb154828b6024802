"""Load code that holds, ties, replaces or moves parameters and modules leaves what plain PyTorch leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, deferred_init, materialize

State = dict[str, Tensor]
LINEAR: State = {"lin.weight": torch.arange(6.0).view(2, 3), "lin.bias": torch.tensor([7.0, 8.0])}
LAYERS: State = {f"layers.{number}.weight": torch.full((2, 2), float(number)) for number in range(4)}
EMBEDDING: State = {"emb.weight": torch.arange(6.0).view(3, 2), "head.weight": torch.ones(3, 2)}


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.prepare()
        self.register_load_state_dict_post_hook(lambda module, keys: module.after())

    def prepare(self) -> None: ...

    def after(self) -> None: ...


class DataIsReplaced(Hooked):
    def after(self) -> None:
        self.lin.weight.data = self.lin.weight.data * 2


class DataIsAssigned(Hooked):
    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        for name, parameter in self.named_parameters():
            parameter.data = state[name].clone()


class HeldInAList(Hooked):
    def prepare(self) -> None:
        self.held = list(self.parameters())

    def after(self) -> None:
        for parameter in self.held:
            parameter.data.mul_(2)


class HeldByAClosure(Hooked):
    def prepare(self) -> None:
        weight = self.lin.weight
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "total", weight.sum().item()))


class KnownByAttribute(Hooked):
    def prepare(self) -> None:
        self.lin.weight.output_dim = 1  # type: ignore[attr-defined]
        self.names = {parameter: name for name, parameter in self.named_parameters()}

    def after(self) -> None:
        self.seen = [self.lin.weight.output_dim, *(self.names[parameter] for parameter in self.parameters())]  # type: ignore[attr-defined]


class ViewIsHeld(Hooked):
    def prepare(self) -> None:
        self.row = self.lin.weight.detach()[1]

    def after(self) -> None:
        self.row.mul_(3)


class Printed(Hooked):
    def after(self) -> None:
        self.text = f"{self.lin.bias.sum():.3f}"


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        result = super().load_state_dict(state, strict)
        self.change()
        return result

    def change(self) -> None: ...


class Pruned(Layers):
    def change(self) -> None:
        self.layers = nn.ModuleList(list(self.layers)[1::2])


class Renamed(Layers):
    def change(self) -> None:
        self.blocks = self.layers
        del self.layers


class Wrapped(Layers):
    def change(self) -> None:
        for number in range(4):
            self.layers[number] = nn.Sequential(self.layers[number])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(3, 2), nn.Linear(2, 3, bias=False)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        result = super().load_state_dict(state, strict)
        self.head.weight = self.emb.weight
        return result


CASES: dict[str, tuple[Callable[[], nn.Module], State]] = {
    "data is replaced": (DataIsReplaced, LINEAR),
    "data is assigned by an own load_state_dict": (DataIsAssigned, LINEAR),
    "parameters are held in a list": (HeldInAList, LINEAR),
    "a parameter is held by a closure": (HeldByAClosure, LINEAR),
    "parameters have attributes and are keys": (KnownByAttribute, LINEAR),
    "a view is held": (ViewIsHeld, LINEAR),
    "a value is printed": (Printed, LINEAR),
    "layers are pruned": (Pruned, LAYERS),
    "layers are renamed": (Renamed, LAYERS),
    "layers are wrapped": (Wrapped, LAYERS),
    "parameters are tied": (Tied, EMBEDDING),
}


def by_materialize(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    with deferred_init():
        model = build()
    materialize(model, checkpoint=path)
    return model


def by_a_block(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    with Fabric(accelerator="cpu", devices=1).init_module(checkpoint=path):
        return build()


@pytest.mark.parametrize("way", [by_materialize, by_a_block])
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_what_plain_pytorch_makes_of_it(name: str, way: Any, tmp_path: Path) -> None:
    build, state = CASES[name]
    torch.save(state, tmp_path / "m.pt")
    plain = build()
    plain.load_state_dict(torch.load(tmp_path / "m.pt"))
    model = way(build, tmp_path / "m.pt")
    expected, found = plain.state_dict(), model.state_dict()
    assert list(found) == list(expected)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    for attribute in ("total", "seen", "text"):
        assert getattr(model, attribute, None) == getattr(plain, attribute, None)
    if name == "parameters are tied":
        assert model.head.weight is model.emb.weight
    if name == "a view is held":
        assert torch.equal(model.row, plain.row)  # type: ignore[arg-type]


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)
        self.double = self.lin.weight.detach() * 2
        self.row = self.lin.weight.detach()[0]


@pytest.mark.parametrize("way", [by_materialize, by_a_block])
def test_a_view_beside_a_loaded_parameter_keeps_nothing_from_following_it(way: Any, tmp_path: Path) -> None:
    torch.save(LINEAR, tmp_path / "m.pt")
    model = way(Viewed, tmp_path / "m.pt")
    assert torch.equal(model.double, LINEAR["lin.weight"] * 2)
    assert torch.equal(model.row, LINEAR["lin.weight"][0])
