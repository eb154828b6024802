"""The report on a model that nobody has filled as a whole: what each tensor holds by now, or waits for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fabric_init import deferred_init, init_report, materialize
from fabric_init.errors import FabricInitError


class Net(nn.Module):
    """With a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("steps", torch.arange(3.0), persistent=False)


def recorded() -> Net:
    with deferred_init():
        return Net()


def statuses(model: nn.Module) -> dict[str, str]:
    return {row.name: row.status for row in init_report(model).rows}


def test_what_waits_is_reported_as_unfilled() -> None:
    model = recorded()
    found = statuses(model)
    assert found.pop("steps") == "initialized"
    assert set(found.values()) == {"unfilled"}
    assert not init_report(model).complete


def test_what_came_since_the_block_is_reported_by_how_it_came() -> None:
    model = recorded()
    nn.init.ones_(model.body.weight)
    model.body.bias = nn.Parameter(torch.zeros(3))
    model.head.load_state_dict({"weight": torch.ones(2, 3)}, strict=False)
    assert statuses(model) == {
        "body.weight": "written by the user",
        "body.bias": "set when built",
        "head.weight": "loaded",
        "head.bias": "initialized",
        "steps": "initialized",
    }


def test_a_model_that_was_loaded_whole_is_reported_as_loaded() -> None:
    model = recorded()
    model.load_state_dict(Net().state_dict())
    found = statuses(model)
    assert found.pop("steps") == "initialized"
    assert set(found.values()) == {"loaded"}


def test_once_the_model_is_filled_that_is_what_is_reported() -> None:
    model = recorded()
    init_report(model)
    assert materialize(model) == init_report(model)


def test_a_model_that_no_block_has_built_has_no_report() -> None:
    with pytest.raises(FabricInitError, match="no init report for this Net"):
        init_report(Net())
