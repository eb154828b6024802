"""What was written in place counts, exactly; what writes nothing fills nothing."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fabric_init import (
    Fabric,
    UninitializedTensorError,
)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.LayerNorm(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens))


NAMES = ["embedding.weight", "body.0.0.weight", "body.0.0.bias", "body.1.weight", "body.1.bias"]


def test_views_of_one_memory_are_unfilled_until_each_is_written(fabric: Fabric) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.ones(4)
            self.left = nn.Parameter(both[:2])
            self.right = nn.Parameter(both[2:])

        def forward(self) -> Tensor:
            return self.left + self.right

    with fabric.init_module(empty_init=True):
        model = Views()
    with pytest.raises(UninitializedTensorError, match=r"(?s)  left.*  right"):
        model()
    nn.init.zeros_(model.left)
    with pytest.raises(UninitializedTensorError, match="  right\n"):
        model()
    fabric.init_missing(model)
    assert torch.equal(model.left, torch.zeros(2))
    assert torch.equal(model.right, torch.ones(2))
    assert model.left.untyped_storage().data_ptr() == model.right.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 2, 2), (3, 3, 5, 5), (5, 4, 2, 3)], ids=str)
def test_another_memory_format_is_not_taken_for_values(fabric: Fabric, shape: tuple[int, ...]) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    model.to(memory_format=torch.channels_last)
    with pytest.raises(UninitializedTensorError, match="weight"):
        model(torch.ones(1, shape[1], 8, 8))
    fabric.init_missing(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.isfinite().all()


NOT_A_WRITE: dict[str, Callable[[nn.Module], object]] = {
    "requires_grad_": lambda model: model.requires_grad_(False),
    "zero_grad": lambda model: model.zero_grad(),
    "train and eval": lambda model: model.eval().train(),
    "to the device it is on": lambda model: model.to("cpu"),
    "half and back": lambda model: model.half().float(),
    "float8": lambda model: model.to(torch.float8_e5m2).to(torch.float32),
    "an optimizer": lambda model: torch.optim.AdamW(model.parameters()).zero_grad(),
    "reading": lambda model: [parameter.detach().clone().sum() for parameter in model.parameters()],
    "deepcopy": copy.deepcopy,
    "state_dict": lambda model: {name: tensor.shape for name, tensor in model.state_dict().items()},
    "repr": repr,
    "repr of a tensor": lambda model: [repr(parameter) for parameter in model.parameters()],
    "an empty strict load of a part": lambda model: nn.ReLU().load_state_dict({}),
}


@pytest.mark.parametrize("do", NOT_A_WRITE.values(), ids=NOT_A_WRITE)
def test_what_writes_nothing_fills_nothing(fabric: Fabric, do: Callable[[nn.Module], object]) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    do(model)
    with pytest.raises(UninitializedTensorError) as caught:
        model(torch.tensor([1]))
    assert [name for name in NAMES if f"  {name}\n" not in str(caught.value)] == []


MARKS = {"nan": (torch.float32, float("nan")), "int8": (torch.int8, -38), "uint8": (torch.uint8, 165)}


MARKS["int64"] = (torch.int64, -(2**63) + 90)


@pytest.mark.parametrize(
    ("dtype", "value", "how"),
    [
        pytest.param(*mark, how, id=f"{name}-{how}")
        for name, mark in MARKS.items()
        for how in ("in place", "assign", "copy")
        if (name, how) != ("nan", "copy")  # cannot be told from memory that was only computed with
    ],
)
def test_a_value_that_was_given_is_taken_whatever_it_is(
    fabric: Fabric, dtype: torch.dtype, value: float, how: str
) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.zeros(3, dtype=dtype))

        def forward(self) -> Tensor:
            return self.x

    given = torch.full((3,), value, dtype=dtype)
    with fabric.init_module(empty_init=True):
        model = One()
    if how in ("in place", "assign"):
        model.load_state_dict({"x": given}, assign=how == "assign")
    else:
        model.x.copy_(given)
    assert torch.equal(
        model().nan_to_num(7.0) if dtype.is_floating_point else model(),
        given.nan_to_num(7.0) if dtype.is_floating_point else given,
    )


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float64,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.complex64,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_tensors_of_every_dtype_and_size_are_guarded_and_initialized(
    fabric: Fabric, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.ones(shape).to(dtype))

    with fabric.init_module(empty_init=True):
        model = One()
    with pytest.raises(UninitializedTensorError, match=r"  x\n"):
        torch.save(model.state_dict(), io.BytesIO())
    fabric.init_missing(model)
    assert model.x.dtype == dtype
    assert torch.equal(model.state_dict()["x"].to(torch.complex64), torch.ones(shape, dtype=torch.complex64))


def test_a_tensor_without_elements_needs_no_values(fabric: Fabric) -> None:
    class None_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.empty(0, 3))

    with fabric.init_module(empty_init=True):
        model = None_()
    fabric.init_missing(model)
    assert model.state_dict()["nothing"].shape == (0, 3)


def test_a_part_written_through_data_fills_nothing(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Embedding(100, 8, padding_idx=0)
    model.weight.data[0].zero_()
    with pytest.raises(UninitializedTensorError, match="weight"):
        model(torch.tensor([1]))


def test_a_bool_buffer_waits_as_well(fabric: Fabric) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    with fabric.init_module(empty_init=True):
        model = Masked()
    copied = copy.deepcopy(model)
    with pytest.raises(UninitializedTensorError, match="  mask\n"):
        copied.mask.tolist()
    fabric.init_missing(model)
    assert copy.deepcopy(model).mask.tolist() == [True, True, True]


def test_integers_that_were_written_in_part_are_still_asked_for(fabric: Fabric) -> None:
    class Indices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.arange(100))

    for where in (slice(0, 1), slice(3, 9), slice(0, 99)):
        with fabric.init_module(empty_init=True):
            model = Indices()
        model.x[where] = 5
        with pytest.raises(UninitializedTensorError, match=r"  x\n"):
            model.x.tolist()
    model.x[99] = 5
    assert model.x.tolist() == [5] * 100
