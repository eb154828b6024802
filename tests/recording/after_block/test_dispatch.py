"""What recorded tensors do after their block, where no model holds them or another block has taken them over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fabric_init import Fabric, deferred_init
from fabric_init.errors import UninitializedTensorError
from fabric_init.recording.tensor.recorded_tensor import recorded


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def test_room_in_a_closure_may_be_written_in_parts_and_refuses_to_be_read_before() -> None:
    with deferred_init():
        cache, other = torch.empty(2, 3), torch.empty(2, 3)
    cache[0] = 1.0
    assert torch.equal(cache[0], torch.ones(3))
    with pytest.raises(UninitializedTensorError, match=r"made by torch\.empty"):
        other.tolist()


def test_a_second_block_that_reads_what_waits_names_it(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(4, 4))
    with (
        pytest.raises(UninitializedTensorError, match=r"Sequential cannot be read: .*\n  0\.weight"),
        fabric.init_module(empty_init=True),
    ):
        nn.Linear(2, 2)
        float(model[0].weight.detach().norm(dim=1).max())


def test_to_empty_then_writing_in_place_fills_a_recorded_model() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.copy_(torch.ones(tensor.shape))
    assert model(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]


def test_copies_of_a_recorded_model_are_on_the_same_tape() -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
    found = recorded(model.weight)
    assert found is not None
    assert copy.deepcopy({"tape": found.tape})["tape"] is found.tape
