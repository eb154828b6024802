"""A plan that is carried out part by part gives what it gives at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_init import CheckpointMismatchError, deferred_init, materialize, param_init_fn
from fabric_init.filling.execute import prepare
from fabric_init.filling.incremental import IncrementalFill
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.plan import LoadOptions
from tests.support.recordings import is_recorded


class Net(nn.Module):
    """Two layers that are halves of one tensor, a tie, and a plain attribute that shows a parameter."""

    def __init__(self) -> None:
        super().__init__()
        halves = torch.randn(2, 4, 4)
        self.left, self.right, self.other = (nn.Linear(4, 4) for _ in range(3))
        self.left.weight, self.right.weight = nn.Parameter(halves[0]), nn.Parameter(halves[1])
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.other.weight
        self.seen = self.left.bias[:2]


def recorded() -> Net:
    torch.manual_seed(3)
    with deferred_init():
        return Net()


def test_parts_have_the_values_of_the_whole_and_so_has_the_report() -> None:
    whole, model = recorded(), recorded()
    expected = materialize(whole)
    filling = IncrementalFill(prepare(model, None, LoadOptions()), WholeTensors())
    filling.begin()
    for part in (model.right, model.tied, model):
        filling.fill_under(part)
    report = filling.finish().report(model)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(model.seen, whole.seen)
    assert model.tied.weight is model.other.weight
    assert report.to_dict() == expected.to_dict()


def test_only_what_is_asked_for_has_memory_and_what_shares_it() -> None:
    model = recorded()
    filling = IncrementalFill(prepare(model, None, LoadOptions()), WholeTensors())
    filling.begin()
    filling.fill_under(model.right)
    left = {name for name, value in model.named_parameters() if is_recorded(value)}
    assert left == {"left.bias", "other.weight", "other.bias", "tied.bias"}
    filling.fill_under(model.left)
    assert not is_recorded(model.seen)
    assert model.seen.data_ptr() == model.left.bias.data_ptr()
    filling.finish()
    assert not any(is_recorded(value) for value in model.parameters())


class Counts(nn.Module):
    """Has load code that changes the module, and a constructor that decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.is_large = bool(self.layer.weight.max() > 10)
        self.loads = 0

    def _load_from_state_dict(self, *args: Any) -> None:
        self.loads += 1
        super()._load_from_state_dict(*args)  # type: ignore[no-untyped-call]


def test_what_fails_before_anything_is_filled_leaves_the_modules_as_they_were(tmp_path: Path) -> None:
    large, small = tmp_path / "large.pt", tmp_path / "small.pt"
    torch.save({"layer.weight": torch.full((2, 2), 20.0)}, large)
    torch.save({"layer.weight": torch.ones(2, 2)}, small)
    with deferred_init():
        model = Counts()
    with pytest.raises(CheckpointMismatchError, match="has looked at"), param_init_fn(model, checkpoint=large):
        pass
    assert model.loads == 0
    with param_init_fn(model, checkpoint=small) as init:
        init(model)
    assert model.loads == 1
    assert model.layer.weight.tolist() == [[1.0, 1.0]] * 2


def test_what_is_kept_outside_of_modules_follows_the_load(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((2, 2), 20.0)}, tmp_path / "m.pt")
    with deferred_init():
        model = nn.Linear(2, 2, bias=False)
        doubled = model.weight.detach() * 2
    with param_init_fn(model, checkpoint=tmp_path / "m.pt") as init:
        init(model)
    assert doubled.tolist() == [[40.0, 40.0]] * 2
