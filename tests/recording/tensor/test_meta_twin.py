"""Tensors of one geometry on one storage share a place, and each has one of its own once an operator changes it."""

from __future__ import annotations

import torch
from torch import nn

from fabric_init import deferred_init, materialize
from fabric_init.recording.tensor.recorded_storage import RecordedStorage
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor, recorded


def place_of(tensor: torch.Tensor) -> object:
    assert isinstance(tensor, RecordedTensor)
    return tensor._twin


def test_a_parameter_shares_the_twin_of_the_tensor_that_it_was_made_of() -> None:
    with deferred_init():
        tensor = torch.empty(3, 4)
        parameter = nn.Parameter(tensor)
    assert place_of(parameter) is place_of(tensor)
    assert parameter.requires_grad
    assert not tensor.requires_grad


def test_a_tensor_that_is_transposed_in_place_leaves_the_parameter_made_of_it_as_it_is() -> None:
    def build() -> nn.Module:
        model, tensor = nn.Module(), torch.empty(3, 4)
        model.before = nn.Parameter(tensor)
        tensor.t_()
        model.after = nn.Parameter(tensor)
        nn.init.normal_(tensor)
        return model

    torch.manual_seed(0)
    eager = build()
    torch.manual_seed(0)
    with deferred_init(rng="eager"):
        model = build()
    assert model.before.shape == (3, 4)
    assert model.after.shape == (4, 3)
    materialize(model)
    for (_, ours), (_, theirs) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert model.before.data_ptr() == model.after.data_ptr()


def test_a_tensor_that_is_set_to_another_storage_is_known_to_be_there() -> None:
    with deferred_init():
        one, other = torch.zeros(3), torch.ones(3)
        beside = nn.Parameter(one)
        with torch.no_grad():
            one.set_(other)
        places = [recorded(tensor) for tensor in (one, other, beside)]
        assert places[0] is places[1]
        assert places[0] is not places[2]
        assert one.tolist() == [1, 1, 1]
        assert beside.tolist() == [0, 0, 0]


def test_the_storage_of_a_tensor_answers_for_itself_when_it_is_asked_for() -> None:
    with deferred_init():
        tensor = torch.empty(3)
        storage = tensor.untyped_storage()
    assert isinstance(storage, RecordedStorage)
    assert storage is tensor.untyped_storage()
    assert storage.device == torch.device("cpu")


def test_what_the_block_answers_by_itself_is_seen_by_modes_and_autograd_after_it() -> None:
    with deferred_init():
        parameter = nn.Parameter(torch.zeros(3))
        doubled = parameter * 2
        assert parameter.grad_fn is None
        assert doubled.grad_fn is not None
        assert doubled.detach().grad_fn is None
    assert parameter.detach().requires_grad is False
    assert parameter.requires_grad_(False) is parameter
    assert not parameter.requires_grad
