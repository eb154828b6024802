"""How a batch goes into ``forward``: every shape in which people keep theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import FabricInitError, deferred_init
from fabric_init.tools.audit.batch import as_call

X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
CPU = torch.device("cpu")


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class WithTargets(nn.Module):
    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        return idx


class Many(nn.Module):
    def forward(self, **named: Any) -> Any:
        return named


class Two(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a


def test_a_tensor_is_the_only_input() -> None:
    call = as_call(One(), X, CPU)
    assert call.args == (X,)
    assert call.labels is None


def test_a_batch_that_a_recorded_constructor_made_has_its_values() -> None:
    with deferred_init():
        batch = {"x": torch.arange(6.0).reshape(2, 3).T, "more": [torch.ones(2)]}
    moved = as_call(Many(), batch, CPU).kwargs
    assert torch.equal(moved["x"], torch.arange(6.0).reshape(2, 3).T)
    assert torch.equal(moved["more"][0], torch.ones(2))


def test_one_tensor_more_than_forward_needs_is_the_labels() -> None:
    call = as_call(One(), (X, Y), CPU)
    assert len(call.args) == 1
    assert call.labels is Y


def test_labels_go_into_forward_where_it_has_a_name_for_them() -> None:
    call = as_call(WithTargets(), [X, Y], CPU)
    assert list(call.kwargs) == ["targets"]
    assert call.labels is Y


def test_two_inputs_are_no_labels() -> None:
    call = as_call(Two(), (X, Y), CPU)
    assert len(call.args) == 2
    assert call.labels is None
    assert as_call(Two(), (X, X, Y), CPU).labels is Y


def test_a_mappings_labels_are_kept_from_a_forward_that_does_not_take_them() -> None:
    call = as_call(One(), {"x": X, "labels": Y}, CPU)
    assert list(call.kwargs) == ["x"]
    assert call.labels is Y
    assert list(as_call(WithTargets(), {"idx": X, "targets": Y}, CPU).kwargs) == ["idx", "targets"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixels": X}, r"the batch has pixels, which One.forward does not take; it takes x"),
        ((X, X, Y), r"the batch has 3 tensors, but One.forward takes \(x\)"),
        (3, r"batch is a int: pass a tensor, a tuple of One.forward's arguments"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(batch: Any, message: str) -> None:
    with pytest.raises(FabricInitError, match=message):
        as_call(One(), batch, CPU)
