"""The comparison with ``from_pretrained`` can fail, and knows whose fault it is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fabric_init import CheckpointMismatchError
from tests.support import hugging_face_folders as folders
from tests.support.hugging_face_folders import Loaded, compare, differences, perturb, tensors_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(3), persistent=False)


def _value(model: Model) -> None:
    model.head.weight.data[4, 2] += 1e-6


def _dtype(model: Model) -> None:
    model.head.bias = nn.Parameter(model.head.bias.detach().double())


def _tie(model: Model) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())


def _buffer(model: Model) -> None:
    model.scale = torch.zeros(3)


def _name(model: Model) -> None:
    model.register_buffer("another", torch.ones(1))


CHANGES = {
    "head.weight": _value,
    "head.bias": _dtype,
    "ties": _tie,
    "scale": _buffer,
    "another": _name,
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_of_any_kind_is_a_difference(name: str) -> None:
    model = Model()
    other = copy.deepcopy(model)
    assert differences(model, other) == {}
    CHANGES[name](other)
    assert name in differences(model, other)


def test_no_tensor_that_is_saved_keeps_the_values_of_its_init() -> None:
    model = Model()
    before = copy.deepcopy(tensors_of(model))
    perturb(model)
    same = {name for name, tensor in tensors_of(model).items() if bool((tensor == before[name]).any())}
    assert same == {"scale"}


def _raise(error: Exception) -> Callable[[], nn.Module]:
    def load() -> nn.Module:
        raise error

    return load


def test_whose_fault_it_is_decides_what_a_load_counts_as() -> None:
    eager = Model()
    perturb(eager)
    other = copy.deepcopy(eager)
    _value(other)
    fresh = frozenset({"head.weight", "embedding.weight"})
    good, bad, failed = Loaded(eager, ""), Loaded(other, "why", fresh), Loaded(None, "why")
    refuse, crash = _raise(CheckpointMismatchError("no\nmatch")), _raise(KeyError("no"))
    found = {
        "equal": compare(lambda: eager, good, eager),
        "another value": compare(lambda: other, good, eager),
        "refused": compare(refuse, good, eager),
        "crashed": compare(crash, good, eager),
        "transformers differs": compare(lambda: eager, bad, eager),
        "transformers differs, ours refuses": compare(refuse, bad, eager),
        "transformers fails": compare(lambda: eager, failed, eager),
        "transformers fails, ours differs": compare(lambda: other, failed, eager),
        "both fail": compare(refuse, failed, eager),
        "fresh values are asked for": compare(lambda: eager, bad, eager, fresh=True),
    }
    assert {name: row.outcome for name, row in found.items()} == {
        "equal": folders.EQUAL,
        "another value": folders.DIFFERENT,
        "refused": folders.REFUSED,
        "crashed": folders.CRASHED,
        "transformers differs": folders.EQUAL_TO_EAGER,
        "transformers differs, ours refuses": folders.NOT_IN_FOLDER,
        "transformers fails": folders.NOT_RELOADED,
        "transformers fails, ours differs": folders.DIFFERENT,
        "both fail": folders.NOT_RELOADED_REFUSED,
        "fresh values are asked for": folders.EQUAL,
    }


def test_a_frozen_parameter_counts_as_the_constructor_made_it() -> None:
    eager = Model()
    eager.head.bias.requires_grad_(False)
    thawed = copy.deepcopy(eager)
    thawed.head.bias.requires_grad_(True)
    row = compare(lambda: eager, Loaded(thawed, ""), eager)
    assert (row.outcome, row.frozen) == (folders.EQUAL, True)
    assert compare(lambda: thawed, Loaded(thawed, ""), eager).outcome == folders.DIFFERENT
