"""What ranks build otherwise is rank 0's on all of them once DDP has set the model up, as without this library."""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, UninitializedTensorError
from tests.support.ranks import run_ranks


class OfItsRank(nn.Module):
    """With tensors that differ between ranks, and others that do not."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.zeros_(self.linear.bias)
        drawn = np.random.default_rng(rank).normal(size=(3, 3)).astype("float32")
        self.drawn = nn.Parameter(torch.from_numpy(drawn))
        self.tied = self.drawn
        self.register_buffer("frequencies", torch.arange(3.0) / (rank + 1), persistent=False)
        self.register_buffer("steps", torch.full((2,), float(rank)))
        self.register_buffer("halved", self.steps / 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ self.drawn + self.frequencies + self.steps.sum()


def _set_up(ours: bool, options: dict[str, Any], after: str) -> dict[str, list[Any]]:
    kind: Any = Fabric if ours else lightning.Fabric
    strategy = lightning.fabric.strategies.DDPStrategy(**options)
    fabric = kind(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    with fabric.init_module(**({"empty_init": True} if ours else {})):
        model = OfItsRank(fabric.global_rank)
    wrapped = fabric.setup(model)
    if ours and after != "nothing":
        with pytest.raises(UninitializedTensorError):  # what is alike waits
            model.linear.weight.sum().item()
    if after == "a load of a part":
        wrapped.load_state_dict({"linear.weight": torch.ones(3, 3)}, strict=False)
    elif ours and after == "init_missing":
        fabric.init_missing(model)
    if after == "nothing":
        return {name: getattr(model, name).tolist() for name in ("drawn", "frequencies", "steps", "halved")}
    found = {name: tensor.tolist() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    wrapped(torch.ones(1, 3)).sum().backward()
    return {**found, "gradient": model.drawn.grad.tolist()}


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@pytest.mark.parametrize("after", ["init_missing", "a load of a part"])
@pytest.mark.parametrize(
    "options", [{}, {"broadcast_buffers": False}, {"init_sync": False}], ids=["as it is", "without buffers", "no sync"]
)
def test_ranks_have_after_setup_what_plain_ddp_gives_them(options: dict[str, Any], after: str) -> None:
    found, expected = (run_ranks(2, _set_up, ours=ours, options=options, after=after) for ours in (True, False))
    assert found == expected


def test_what_differs_has_values_when_nothing_was_loaded() -> None:
    found, expected = (run_ranks(2, _set_up, ours=ours, options={}, after="nothing") for ours in (True, False))
    assert found == expected


class Unwritten(nn.Module):
    """With a parameter that has no init: a load is to bring it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def _loaded_on(ours: bool, early: int) -> dict[str, list[Any]]:
    """Load on one rank before setup; where that is not rank 0, on all ranks after it, too."""
    kind: Any = Fabric if ours else lightning.Fabric
    fabric = kind(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    with fabric.init_module(**({"empty_init": True} if ours else {})):
        model = Unwritten()
    state = {"linear.weight": torch.ones(3, 3), "linear.bias": torch.ones(3), "scale": torch.full((3,), 2.0)}
    if fabric.global_rank == early:
        model.load_state_dict(state)
    wrapped = fabric.setup(model)
    if early:
        wrapped.load_state_dict({name: value + 1 for name, value in state.items()})
    wrapped(torch.ones(1, 3)).sum().backward()
    return {name: parameter.tolist() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("early", [0, 1])
def test_what_one_rank_has_loaded_before_setup_is_sent_from_rank_0_only(early: int) -> None:
    found, expected = (run_ranks(2, _loaded_on, ours=ours, early=early) for ours in (True, False))
    assert found == expected
