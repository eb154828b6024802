"""The address of a tensor without values: a key, and no number."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fabric_init import UninitializedTensorError, deferred_init, materialize


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.other = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.one.weight
        self.none = nn.Parameter(torch.empty(0))


def recorded() -> Any:
    with deferred_init():
        return Tied()


def test_addresses_are_equal_exactly_where_the_memory_will_be_the_same() -> None:
    model = recorded()
    one, other, tied = (linear.weight for linear in (model.one, model.other, model.tied))
    assert one.data_ptr() == tied.data_ptr() == one.detach().view(16).data_ptr() == one.data[0:2].data_ptr()
    assert one.data_ptr() != other.data_ptr()
    assert one.data_ptr() != one.detach()[1:].data_ptr()
    assert one.data_ptr() != 0
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert names[one.data_ptr()] == "tied.weight"
    assert names[other.data_ptr()] == "other.weight"
    assert model.none.data_ptr() == 0


USES: dict[str, Callable[[Any], object]] = {
    "int": int,
    "hex": hex,
    "truth": bool,
    "sum": lambda address: address + 4,
    "sum, the other way": lambda address: 4 + address,
    "alignment": lambda address: address % 16,
    "order": lambda address: address < 100,
    "memory": lambda address: (ctypes.c_float * 16).from_address(int(address)),
}


@pytest.mark.parametrize("use", USES)
def test_an_address_without_memory_refuses_to_be_a_number(use: str) -> None:
    model = recorded()
    with pytest.raises(UninitializedTensorError, match=r"one\.weight"):
        USES[use](model.one.weight.data_ptr())


def test_an_address_that_was_kept_is_the_true_one_once_there_is_memory() -> None:
    model = recorded()
    kept, row = model.one.weight.data_ptr(), model.one.weight.detach()[1:].data_ptr()
    materialize(model)
    assert int(kept) == model.one.weight.data_ptr()
    assert row - kept == 16
    assert type(model.one.weight.data_ptr()) is int
