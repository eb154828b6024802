"""Which tensors a model has: each once, under all of its names, wherever it is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fabric_init import deferred_init, materialize
from fabric_init.planning.tensors import TensorInfo, Walk, find_tensors, modules_once, named_modules, registered_tensors


def slots(model: nn.Module) -> dict[str, TensorInfo]:
    return {slot.name: slot for slot, _ in find_tensors(model)}


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.again = self.linear
        self.weight = self.linear.weight
        self.none = None
        self.register_parameter("absent", None)
        self.register_buffer("no_buffer", None)
        self.register_buffer("saved", torch.ones(1))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.plain = torch.arange(3)
        self.listed = [torch.zeros(1), {"key": (torch.zeros(2), 3)}]
        self.real = torch.tensor([1.0, 2.0]).numpy()


def test_kinds_and_names_of_everything_that_holds_a_tensor() -> None:
    with deferred_init():
        model = Everything()
    found = slots(model)
    assert {name: slot.kind for name, slot in found.items()} == {
        "weight": "parameter",
        "linear.bias": "parameter",
        "saved": "buffer",
        "unsaved": "non-persistent buffer",
        "plain": "attribute",
        "listed[0]": "attribute",
        "listed[1]['key'][0]": "attribute",
    }
    assert found["weight"].names == ("weight", "linear.weight", "again.weight")
    assert found["linear.bias"].names == ("linear.bias", "again.bias")
    assert [name for name, slot in found.items() if slot.saved] == ["weight", "saved", "linear.bias"]


def test_a_slot_gives_the_device_that_was_asked_for_not_meta() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
    for slot in slots(model).values():
        assert slot.device == torch.device("cpu")
        assert slot.ref is not None
        assert not slot.real


def test_a_real_tensor_is_real_and_a_real_plain_attribute_is_no_business_of_ours() -> None:
    model = nn.Linear(2, 2)
    model.plain = torch.ones(2)
    assert {name: (slot.real, slot.ref) for name, slot in slots(model).items()} == {
        "weight": (True, None),
        "bias": (True, None),
    }


def test_a_buffer_that_one_module_saves_and_another_does_not_is_saved() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = torch.ones(2)
            self.register_buffer("aside", shared, persistent=False)
            self.register_buffer("kept", shared)

    with deferred_init():
        model = Shared()
    (slot,) = slots(model).values()
    assert slot.kind == "buffer"
    assert set(slot.names) == {"aside", "kept"}


class Holder:
    def __init__(self) -> None:
        self.tensor = torch.arange(3.0)


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: SimpleNamespace(tensor=t),
        lambda t: [[[[t]]]],
        lambda t: {"a": {"b": [t]}},
        lambda t: (t, (t,)),
    ],
    ids=["an object", "four lists", "dicts", "tuples"],
)
def test_no_tensor_stays_on_meta_wherever_the_constructor_put_it(hold) -> None:
    def found(value: object) -> Tensor:
        while not isinstance(value, Tensor):
            value = next(
                iter(
                    vars(value).values()
                    if hasattr(value, "__dict__")
                    else value.values()
                    if isinstance(value, dict)
                    else value
                )
            )
        return value

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.held = hold(torch.arange(3.0))

    with deferred_init():
        model = Model()
    materialize(model)
    assert torch.equal(found(model.held), torch.arange(3.0))


def test_a_walk_finds_what_is_found_without_one() -> None:
    model = Everything()
    walk = Walk(model)
    assert walk.named == named_modules(model)
    assert walk.once == modules_once(model)
    assert [name for name, _ in walk.named] == [name for name, _ in model.named_modules(remove_duplicate=False)]
    for (name, kind, tensor), (other, its_kind, its) in zip(walk.registered, registered_tensors(model), strict=True):
        assert (name, kind) == (other, its_kind)
        assert tensor is its
    assert walk.tensors[: len(walk.registered)] == walk.registered
    assert [info for info, _ in find_tensors(walk)] == [info for info, _ in find_tensors(model)]


def test_a_walk_tells_what_the_model_held_then() -> None:
    model = Everything()
    walk, before = Walk(model), model.linear.weight
    model.linear.weight = nn.Parameter(torch.zeros(2, 2))
    assert any(tensor is before for _, _, tensor in walk.registered)
    assert not any(tensor is model.linear.weight for _, _, tensor in walk.registered)
    assert any(tensor is model.linear.weight for _, _, tensor in Walk(model).registered)
