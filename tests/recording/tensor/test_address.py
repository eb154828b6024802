"""The address of a tensor without values: a key, and no number."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fabric_init import RecordingError, UninitializedTensorError, deferred_init, materialize


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.other = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.one.weight
        self.none = nn.Parameter(torch.empty(0))


def save_model(tensors: dict[str, torch.Tensor], path: Path) -> None:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor)
    safetensors.torch.save_model(model, str(path))


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


def test_an_address_is_the_same_key_after_another_block_has_used_the_tensor() -> None:
    model = recorded()
    names = {model.one.weight.data_ptr(): "one.weight"}
    with deferred_init():
        later = nn.Linear(4, 4)
        later.weight.data.copy_(model.one.weight.data * 2)
    assert names[model.one.weight.data_ptr()] == "one.weight"
    assert later.weight.data_ptr() not in names


USES: dict[str, Callable[[Any], object]] = {
    "int": int,
    "hex": hex,
    "truth": bool,
    "alignment": lambda address: address % 16,
    "order": lambda address: address < 100,
    "memory": lambda address: (ctypes.c_float * 16).from_address(int(address)),
}


@pytest.mark.parametrize("use", USES)
def test_an_address_without_memory_refuses_to_be_a_number(use: str) -> None:
    model = recorded()
    with pytest.raises(UninitializedTensorError, match=r"one\.weight"):
        USES[use](model.one.weight.data_ptr())


def test_addresses_on_one_storage_have_an_order_and_a_distance() -> None:
    weight = recorded().one.weight
    row = weight.detach()[1:]
    assert weight.data_ptr() + 16 == 16 + weight.data_ptr() == row.data_ptr()
    assert row.data_ptr() - 16 == weight.data_ptr() < row.data_ptr()
    assert row.data_ptr() - weight.data_ptr() == 16
    assert weight.data_ptr() == weight.untyped_storage().data_ptr() == row.untyped_storage().data_ptr() > 0


def test_in_a_block_there_is_no_number_but_all_that_tells_who_shares_memory() -> None:
    with deferred_init():
        model = Tied()
        one, other, tied = (linear.weight for linear in (model.one, model.other, model.tied))
        assert one.data_ptr() == tied.data_ptr() != other.data_ptr()
        assert one.data_ptr()
        assert (
            one.untyped_storage().data_ptr() == tied.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
        )
        for use in (int, hex, lambda address: address % 16):
            with pytest.raises(RecordingError, match="in a recorded block"):
                use(one.data_ptr())
        kept = one.data_ptr()
    materialize(model)
    assert int(kept) == one.data_ptr()


@pytest.mark.parametrize("save", [safetensors.torch.save_file, save_model])
def test_safetensors_in_a_block_saves_the_true_values(tmp_path: Path, save: Callable[..., None]) -> None:
    with deferred_init():
        held = {"table": torch.arange(4.0), "row": torch.arange(8.0).view(2, 4)[1].clone()}
        save(held, tmp_path / "x.safetensors")
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert found["table"].tolist() == [0, 1, 2, 3]
    assert found["row"].tolist() == [4, 5, 6, 7]


def test_safetensors_in_a_block_refuses_tied_tensors_as_it_always_does() -> None:
    with deferred_init(), pytest.raises(RuntimeError, match="share memory"):
        safetensors.torch.save(Tied().state_dict())


def test_an_address_that_was_kept_is_the_true_one_once_there_is_memory() -> None:
    model = recorded()
    kept, row = model.one.weight.data_ptr(), model.one.weight.detach()[1:].data_ptr()
    materialize(model)
    assert int(kept) == model.one.weight.data_ptr()
    assert row - kept == 16
    assert type(model.one.weight.data_ptr()) is int
