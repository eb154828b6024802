"""Expected moments are those of real tensors, for every init function and for what models do by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fabric_init import audit, materialize
from fabric_init.api import deferred_init
from fabric_init.recording.tape.op_properties import INIT_FUNCTIONS
from fabric_init.reports.statistics import Moments, mixture, of_init_function, truncated_normal

SIZE = torch.Size((128, 96, 3))
CALLS: list[tuple[str, torch.Size, dict[str, Any]]] = [
    ("uniform_", SIZE, {"a": -1.0, "b": 3.0}),
    ("normal_", SIZE, {"mean": 1.0, "std": 0.5}),
    ("trunc_normal_", SIZE, {"std": 1.0, "a": -0.5, "b": 2.0}),
    ("trunc_normal_", torch.Size((100, 100)), {"mean": 2.4, "std": 0.5}),
    ("constant_", SIZE, {"val": 2.5}),
    ("ones_", SIZE, {}),
    ("zeros_", SIZE, {}),
    ("eye_", torch.Size((40, 30)), {}),
    ("dirac_", torch.Size((8, 6, 3)), {"groups": 2}),
    ("xavier_uniform_", SIZE, {"gain": 2.0}),
    ("xavier_normal_", SIZE, {}),
    ("kaiming_uniform_", SIZE, {"a": math.sqrt(5)}),
    ("kaiming_normal_", SIZE, {"mode": "fan_out", "nonlinearity": "relu"}),
    ("orthogonal_", torch.Size((60, 30)), {"gain": 1.5}),
    ("sparse_", torch.Size((80, 90)), {"sparsity": 0.3, "std": 0.2}),
]


def measured(tensor: torch.Tensor) -> Moments:
    return Moments(float(tensor.double().mean()), float(tensor.double().std(correction=0)))


def assert_close(found: Moments, real: Moments) -> None:
    assert found.std == pytest.approx(real.std, rel=0.03, abs=1e-6)
    assert found.mean == pytest.approx(real.mean, abs=0.03 * max(real.std, abs(real.mean), 1e-6))


def test_every_init_function_is_covered() -> None:
    assert {name for name, _, _ in CALLS} == set(INIT_FUNCTIONS)


@pytest.mark.filterwarnings("ignore:mean is more than 2 std")
@pytest.mark.parametrize(("name", "size", "given"), CALLS, ids=[f"{name} {given}" for name, _, given in CALLS])
def test_an_init_function_gives_what_is_expected_of_it(name: str, size: torch.Size, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    function = INIT_FUNCTIONS[name]
    assert_close(of_init_function(function, size, given), measured(function(torch.empty(size), **given)))


def test_a_normal_cut_far_out_in_its_tail_is_all_at_the_bound() -> None:
    assert truncated_normal(0.0, 0.001, 1.0, 2.0) == Moments(1.0, 0.0)


def test_a_mixture_counts_what_lies_between_the_means_of_its_parts() -> None:
    assert mixture([(1, Moments(-1.0, 0.0)), (1, Moments(1.0, 0.0))]) == Moments(0.0, 1.0)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    for row in weight:
        row.normal_(std=0.1)
    return weight


def _steps(weight: torch.Tensor) -> torch.Tensor:
    weight.normal_()
    for _ in range(1000):
        weight.mul_(0.999)
    return weight


def _columns(weight: torch.Tensor) -> torch.Tensor:
    weight[:, :30].fill_(2)
    weight[:, 20:].fill_(3)
    return weight


# What models write by hand, from a fresh 200 × 50 tensor to the parameter.
BY_HAND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda w: torch.randn(200, 50) * 0.02,
    "scaled in place": lambda w: w.normal_().mul_(0.02).add_(1),
    "divided": lambda w: w.uniform_(-1, 1).div_(4),
    "times zero": lambda w: torch.ones(200, 50) * 0,
    "shifted": lambda w: torch.rand(200, 50) - 0.5,
    "negative": lambda w: -torch.rand(200, 50),
    "copied": lambda w: w.copy_(torch.randn(200, 50) * 3),
    "cast": lambda w: (torch.randn(200, 50, dtype=torch.float64) * 3).float(),
    "row by row": _rows,
    "columns that overlap": _columns,
    "in a thousand steps": _steps,
    "joined": lambda w: torch.cat([torch.zeros(100, 50), torch.ones(100, 50)]),
    "computed": lambda w: torch.arange(10_000.0).reshape(200, 50).sin(),
    "clamped": lambda w: w.normal_().clamp_(-0.5, 0.5),
    "from numbers": lambda w: torch.tensor([[1.0, 2.0, 3.0]]),
    "exponential": lambda w: w.exponential_(2.0),
    "a part, later": lambda w: w.normal_().index_fill_(0, torch.tensor([0, 1]), 5.0),
}


class ByHand(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        with torch.no_grad():
            self.weight = nn.Parameter(BY_HAND[how](torch.empty(200, 50)))


@pytest.mark.parametrize("how", BY_HAND)
def test_what_a_model_computes_by_hand_is_as_expected(how: str) -> None:
    torch.manual_seed(0)
    row = audit(lambda: ByHand(how)).rows[0]
    assert row.mean is not None
    assert row.std is not None
    with deferred_init():
        model = ByHand(how)
    materialize(model)
    assert_close(Moments(row.mean, row.std), measured(model.weight.detach()))


def test_what_is_computed_in_too_many_steps_and_too_large_to_measure_is_said_to_be_unknown() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1 << 14, 1 << 14).sin())

    (row,) = audit(Large).rows
    assert (row.mean, row.std) == (None, None)
    assert row.rule == "randn(), then sin()"
