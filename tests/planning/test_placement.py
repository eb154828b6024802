"""``become``: a tensor takes over memory and stays the same object in every respect."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from fabric_init import deferred_init
from fabric_init.planning.placement import WholeTensors, become
from fabric_init.planning.tensors import find_tensors


def recorded_parameter(**options: bool) -> nn.Parameter:
    with deferred_init():
        return nn.Parameter(torch.ones(2, 3), **options)


def test_the_object_and_its_attributes_stay_and_the_memory_is_the_values_own() -> None:
    parameter = recorded_parameter()
    parameter.mark = "mine"
    value = torch.randn(2, 3)
    value.theirs = "the value's"
    before, alive = id(parameter), weakref.ref(parameter)
    become(parameter, value)
    assert id(parameter) == before
    assert alive() is parameter
    assert type(parameter) is nn.Parameter
    assert parameter.data_ptr() == value.data_ptr()
    assert vars(parameter) == {"mark": "mine"}
    assert torch.equal(parameter, value)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_requires_grad_stays(requires_grad: bool) -> None:
    parameter = recorded_parameter(requires_grad=requires_grad)
    become(parameter, torch.ones(2, 3))
    assert parameter.requires_grad is requires_grad
    assert parameter.is_leaf


def test_hooks_stay_and_fire_once_and_can_still_be_removed() -> None:
    parameter = recorded_parameter()
    fired = []
    first = parameter.register_hook(lambda grad: fired.append("grad"))
    second = parameter.register_post_accumulate_grad_hook(lambda tensor: fired.append("accumulated"))
    become(parameter, torch.ones(2, 3))
    parameter.sum().backward()
    assert fired == ["grad", "accumulated"]
    first.remove(), second.remove()
    parameter.sum().backward()
    assert fired == ["grad", "accumulated"]


def test_a_hook_may_be_added_afterwards() -> None:
    parameter = recorded_parameter()
    become(parameter, torch.ones(2, 3))
    fired = []
    parameter.register_hook(lambda grad: fired.append(grad.sum().item()))
    parameter.sum().backward()
    assert fired == [6.0]


def test_a_gradient_that_was_there_stays_or_goes_but_never_mixes() -> None:
    parameter = nn.Parameter(torch.ones(2))
    become(parameter, torch.full((2,), 2.0))
    (parameter * 3).sum().backward()
    assert torch.equal(parameter.grad, torch.full((2,), 3.0))


def test_subclasses_of_parameter_stay_what_they_are() -> None:
    class Special(nn.Parameter):
        pass

    with deferred_init():
        parameter = Special(torch.ones(2))
    become(parameter, torch.zeros(2))
    assert type(parameter) is Special
    assert torch.equal(parameter, torch.zeros(2))


def test_whole_tensors_are_where_they_were_asked_for_unless_a_device_is_given() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
        other = nn.Linear(2, 2, device="cuda")
    (here, _), *_ = find_tensors(model)
    (there, _), *_ = find_tensors(other)
    assert WholeTensors().device(here) == torch.device("cpu")
    assert WholeTensors().device(there).type == "cuda"
    assert WholeTensors(torch.device("cpu")).device(there) == torch.device("cpu")
    assert WholeTensors().region(here) is None
