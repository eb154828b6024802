"""Uncommon ways of touching tensors after the block: each gives what plain PyTorch gives, or an error of ours."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pickle import dumps as pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fabric_init import RecordingError, UninitializedTensorError, deferred_init, init_missing, materialize

ROWS = 1 << 18  # floats of a row, so that a row is a megabyte


class Small(nn.Module):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.125, 1.125, 16).view(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.register_buffer("table", torch.linspace(1, 2, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.table


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, ROWS))


class OwnParameter(nn.Parameter):
    pass


class WithOwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = OwnParameter(torch.linspace(0.125, 1.125, 4))


class Build:
    """Builds a model, and gives what nothing was loaded to its own init, which plain PyTorch has given it."""

    def __init__(self, recorded: bool) -> None:
        self.recorded = recorded

    def __call__(self, kind: type[Any]) -> Any:
        if not self.recorded:
            return kind()
        with deferred_init():
            model = kind()
        torch.manual_seed(1)
        return model

    def fill(self, model: nn.Module) -> None:
        if self.recorded:
            init_missing(model)


def state() -> dict[str, Tensor]:
    return Small().state_dict()


@torch.no_grad()
def a_buffer_that_is_used_again(build: Build) -> Any:
    model, row = build(Wide), torch.empty(ROWS)
    for index in range(4):
        row.fill_(index + 1.0)
        model.weight[index].copy_(row)
    return model.weight[:, :2]


@torch.no_grad()
def one_row_of_a_buffer_that_changes(build: Build) -> Any:
    model, row = build(Wide), torch.ones(ROWS)
    model.weight[0].copy_(row)
    row.data.fill_(7)
    build.fill(model)
    return model.weight[:, :2]


def out_of_the_same_shape(build: Build) -> Any:
    model = build(Small)
    torch.add(torch.ones(4, 4), 1, out=model.weight.detach())
    return model.weight


def set_of_a_table(build: Build) -> Any:
    model = build(Small)
    model.table.set_(torch.ones(3))
    return model.table


def a_table_that_shrinks(build: Build) -> Any:
    return build(Small).table.resize_(2).clone()


def set_of_a_parameter(build: Build) -> Any:
    model = build(Small)
    with torch.no_grad():
        model.weight.set_(torch.ones(4, 4))
    return model.weight


def set_of_an_alias(build: Build) -> Any:
    model = build(Small)
    model.weight.detach().set_(torch.ones(4, 4))
    build.fill(model)
    return model.weight


def operators_of_a_subclass(build: Build) -> Any:
    model = build(WithOwnParameter)
    results = [1 - model.weight, 2**model.weight, 1 / model.weight]
    build.fill(model)
    return torch.stack([result.detach() for result in results])


def a_gradient_from_before_the_load(build: Build) -> Any:
    model = build(Small)
    model.weight.grad = torch.ones(4, 4)
    model.load_state_dict(state())
    return model.weight.grad


def a_view_from_before_the_load(build: Build) -> Any:
    model = build(Small)
    view = model.weight.view(-1)
    model.load_state_dict(state())
    (model(torch.ones(1, 4)).sum() + view.sum()).backward()
    return model.weight.grad


def a_graph_from_before_the_load(build: Build) -> Any:
    model = build(Small)
    doubled = (model.weight * 2).sum()
    model.load_state_dict(state())
    doubled.backward()
    return model.weight.grad


def rows_that_are_drawn(build: Build) -> Any:
    model = build(Small)
    torch.manual_seed(3)
    model.weight.data[0].normal_()
    drawn = torch.rand(4, 4)
    build.fill(model)
    return torch.stack([model.weight, drawn])


def draws_from_a_table(build: Build) -> Any:
    model = build(Small)
    torch.manual_seed(3)
    drawn = [torch.rand_like(model.table), torch.bernoulli(model.table / 4), torch.normal(model.table, model.table)]
    return torch.stack([*drawn, torch.multinomial(model.table, 4).float(), torch.rand(4)])


def draws_in_the_shape_of_a_parameter(build: Build) -> Any:
    model = build(Small)
    torch.manual_seed(3)
    return torch.stack([torch.rand_like(model.weight.detach()), torch.rand(4, 4)])


def a_view_made_without_autograd(build: Build) -> Any:
    model = build(Small)
    with torch.no_grad():
        row = model.weight[0]
        row.fill_(2.0)
    model.load_state_dict(state())
    return model.weight, row


def a_load_in_inference_mode(build: Build) -> Any:
    model = build(Small)
    with torch.inference_mode():
        model.load_state_dict(state())
    model(torch.ones(1, 4)).sum().backward()
    return model.weight.grad


def filled_in_inference_mode(build: Build) -> Any:
    model = build(Small)
    if build.recorded:
        with torch.inference_mode():
            materialize(model)
    model(torch.ones(1, 4)).sum().backward()
    return model.weight.grad


@torch.no_grad()
def copied_together(build: Build) -> Any:
    model = build(Small)
    torch._foreach_copy_([model.weight, model.bias], [torch.ones(4, 4), torch.ones(4)])
    return model(torch.ones(1, 4))


def the_storage_of_a_table(build: Build) -> Any:
    model = build(Small)
    storage = model.table.storage()
    storage[0] = 9
    return torch.tensor([*storage.tolist(), *model.table.tolist()])


def a_storage_from_before_the_load(build: Build) -> Any:
    model = build(Small)
    storage = model.weight.untyped_storage()
    model.load_state_dict(state())
    return torch.tensor(storage.tolist())


WAYS = [
    *(a_buffer_that_is_used_again, one_row_of_a_buffer_that_changes, out_of_the_same_shape, set_of_a_table),
    *(a_table_that_shrinks, set_of_a_parameter, set_of_an_alias, operators_of_a_subclass),
    *(a_gradient_from_before_the_load, a_view_from_before_the_load, a_graph_from_before_the_load),
    *(rows_that_are_drawn, draws_from_a_table, draws_in_the_shape_of_a_parameter, a_view_made_without_autograd),
    *(a_load_in_inference_mode, filled_in_inference_mode, copied_together, the_storage_of_a_table),
    a_storage_from_before_the_load,
]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_as_plain_pytorch(way: Callable[[Build], Any]) -> None:
    expected, found = way(Build(recorded=False)), way(Build(recorded=True))
    both = [(expected, found)] if isinstance(expected, Tensor) else zip(expected, found, strict=True)
    for theirs, ours in both:
        assert torch.equal(theirs, ours)


def test_out_of_another_shape_than_what_waits_is_refused_and_changes_nothing() -> None:
    model = Build(recorded=True)(Small)
    with pytest.raises(RecordingError, match=r"shape \(4, 4\) that waits.*shape \(2, 4\)"):
        torch.add(torch.ones(2, 4), 1, out=model.weight.detach())
    init_missing(model)
    assert torch.equal(model.weight, Small().weight)


def test_the_storage_of_what_waits_has_no_bytes() -> None:
    weight = Build(recorded=True)(Small).weight.untyped_storage()
    assert "no values yet" in repr(weight)
    assert weight.device == torch.device("cpu")
    for use in (
        weight.tolist,
        lambda: weight[0],
        lambda: weight.clone().tolist(),
        weight.float,
        lambda: pickle(weight),
    ):
        with pytest.raises(UninitializedTensorError, match="weight"):
            use()
    with pytest.raises(RuntimeError, match="storage"):  # torch's own: it claims another device than it has
        torch.empty(0, device=weight.device).set_(weight, 0, (4, 4))


def test_adding_to_all_elements_is_no_value() -> None:
    model = Build(recorded=True)(Small)
    every = torch.arange(4).repeat(4, 1).t()
    model.weight.data.scatter_(0, every, torch.ones(4, 4), reduce="add")
    with pytest.raises(UninitializedTensorError, match="weight"):
        model(torch.ones(1, 4))


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frequencies = 1 / (1e4 ** (torch.arange(0, 8, 2).float() / 8))
        self.linear = nn.Linear(4, 4)


def test_a_model_with_hundreds_of_tables_is_loaded() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(Rotary() for _ in range(400)))

    expected = build()
    with deferred_init():
        model = build()
    model.load_state_dict(expected.state_dict())
    assert torch.equal(model[399].frequencies, expected[399].frequencies)  # type: ignore[index]


def test_threads_may_write_the_same_tensors_at_once() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))

    values = build().state_dict()
    with deferred_init():
        model = build()
    errors = []

    def write() -> None:
        try:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(values[name])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
