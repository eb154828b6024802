"""Tensors without values that are moved, cast, or given other memory by ``to_empty`` go on waiting."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, UninitializedTensorError, deferred_init, materialize


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.arange(100))
        self.register_buffer("angles", torch.linspace(0, 1, 50), persistent=False)
        self.register_buffer("short", torch.arange(10, dtype=torch.int16))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.to(self.first.weight.dtype)))


X = torch.ones(2, 4)
NAMES = ["first.weight", "first.bias", "second.bias", "steps", "short"]


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def build(fabric: Fabric) -> Model:
    with fabric.init_module(empty_init=True):
        return Model()


MOVES: dict[str, Callable[[Fabric, Any], Any]] = {
    "to_empty": lambda fabric, model: model.to_empty(device="cpu"),
    "twice": lambda fabric, model: model.to_empty(device="cpu").to_empty(device="cpu"),
    "parts": lambda fabric, model: [part.to_empty(device="cpu") for part in model.children()] and model,
    "after a cast": lambda fabric, model: model.half().to_empty(device="cpu"),
    "before a cast": lambda fabric, model: model.to_empty(device="cpu").double(),
    "after setup": lambda fabric, model: fabric.setup(model).to_empty(device="cpu"),
    "of a copy": lambda fabric, model: copy.deepcopy(model).to_empty(device="cpu"),
    "of a model around it": lambda fabric, model: nn.Sequential(model).to_empty(device="cpu")[0],
    "a cast to integers and back": lambda fabric, model: (
        model.requires_grad_(False).type(torch.int32).type(torch.float32)
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_has_other_memory_still_waits(fabric: Fabric, name: str) -> None:
    moved = MOVES[name](fabric, build(fabric))
    for use in (lambda: moved(X), lambda: moved.first.weight.tolist(), lambda: pickle.dumps(moved)):
        with pytest.raises(UninitializedTensorError) as caught:
            use()
        assert [tensor for tensor in NAMES[:3] if f"  {tensor}\n" not in str(caught.value)] == []
    fabric.init_missing(moved)
    moved(X)
    expected = build(fabric)
    fabric.init_missing(expected)
    assert moved.steps.tolist() == expected.steps.tolist()
    assert torch.equal(moved.angles.half(), expected.angles.half()) or "integers" in name


@pytest.mark.parametrize("name", NAMES)
def test_each_tensor_is_still_asked_for_after_to_empty(fabric: Fabric, name: str) -> None:
    model = build(fabric).to_empty(device="cpu")
    for other, tensor in model.named_parameters():
        if other != name:
            nn.init.ones_(tensor)
    for other, tensor in model.named_buffers():
        if other != name:
            tensor.zero_()
    with pytest.raises(UninitializedTensorError, match=f"\n  {name}\n"):
        model(X)


def test_a_load_and_what_it_leaves_out_come_into_the_other_memory(fabric: Fabric) -> None:
    model = build(fabric).to_empty(device="cpu")
    model.load_state_dict({"steps": torch.ones(100, dtype=torch.long)}, strict=False)
    assert model.short.tolist() == list(range(10))
    assert model.steps.tolist() == [1] * 100
    assert model.second.weight is model.first.weight
    assert model(X).isfinite().all()


def with_a_layer_from(model: nn.Module, first: nn.Linear) -> nn.Module:
    """Put a layer made outside a block into ``model``, whose values are those of ``first``."""
    made = nn.Linear(4, 4)
    made.weight.data = first.weight.data  # the same memory
    made.bias.data = first.bias.data * 2  # computed from what waits
    model.add_module("made", made)
    return model


def test_data_that_waits_is_waited_for_by_a_parameter_that_had_values(fabric: Fabric) -> None:
    model = build(fabric)
    with_a_layer_from(model, model.first)
    for use in (lambda: model(X), lambda: torch.save(model.state_dict(), io.BytesIO())):
        with pytest.raises(UninitializedTensorError, match=r"\n  first\.weight\n"):
            use()
    fabric.init_missing(model)
    assert model.made.weight.data_ptr() == model.first.weight.data_ptr()
    assert torch.equal(model.made.bias, model.first.bias * 2)


def test_data_that_waits_comes_with_a_load(fabric: Fabric) -> None:
    model = build(fabric)
    with_a_layer_from(model, model.first)
    values = {name: torch.full(tensor.shape, 3, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: value for name, value in values.items() if name != "made.weight"}, strict=False)
    assert model.made.weight.tolist() == [[3.0] * 4] * 4
    assert model.made.weight.data_ptr() == model.first.weight.data_ptr()


def test_what_was_written_in_part_keeps_what_was_written(fabric: Fabric) -> None:
    model = build(fabric)
    with torch.no_grad():
        model.first.weight[0] = 1
    model.steps[50:] = 7
    with pytest.raises(UninitializedTensorError) as caught:
        model(X)
    assert [name for name in NAMES if f"  {name}\n" not in str(caught.value)] == []
    with torch.no_grad():
        model.first.weight[1:] = 2
    model.steps[:50] = 5
    assert model.first.weight.tolist() == [[1.0] * 4, *[[2.0] * 4] * 3]
    assert model.steps.tolist() == [5] * 50 + [7] * 50


def test_a_cast_of_a_copy_is_the_copys_alone(fabric: Fabric) -> None:
    model = build(fabric)
    other = copy.deepcopy(model)
    assert other.half() is other
    assert other.first.weight.dtype == torch.float16
    assert model.first.weight.dtype == torch.float32


def test_a_part_with_values_pickles_while_the_rest_waits(fabric: Fabric) -> None:
    model = build(fabric)
    fabric.init_missing(model.first)
    again = pickle.loads(pickle.dumps(model.first))
    assert torch.equal(again(X), model.first(X))
    assert again.to_empty(device="cpu") is again


def test_nothing_of_the_guard_is_left_in_a_complete_model(fabric: Fabric) -> None:
    model = build(fabric).to_empty(device="cpu")
    fabric.init_missing(model)
    plain = {name for module in Model().modules() for name in vars(module)}
    left = {name for module in model.modules() for name in vars(module)} - plain
    assert left <= {"_fabric_init_report"}


def test_what_waits_in_a_block_that_fails_still_waits_after_to_empty(fabric: Fabric) -> None:
    model = build(fabric)
    with pytest.raises(ZeroDivisionError), fabric.init_module(empty_init=True):
        whole = nn.Sequential(model, nn.Linear(4, 2))
        1 / 0  # noqa: B018
    model.to_empty(device="cpu")
    with pytest.raises(UninitializedTensorError, match="  first\\.weight\n"):
        model(X)
    with pytest.raises(UninitializedTensorError, match="ended with an error"):
        whole(X)
    fabric.init_missing(model)
    assert model(X).isfinite().all()


def test_what_waits_in_a_recorded_model_still_waits_after_to_empty(fabric: Fabric) -> None:
    model = build(fabric)
    with deferred_init():
        whole = nn.Sequential(model, nn.Linear(4, 2))
        model.register_parameter("more", nn.Parameter(torch.ones(3)))
    model.to_empty(device="cpu")
    with pytest.raises(UninitializedTensorError, match=r"first\.weight\n"):
        whole(X)
    materialize(whole)
    assert whole(X).isfinite().all()
    assert model.more.tolist() == [1.0] * 3
