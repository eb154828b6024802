"""Which modules become units of FSDP2. What the strategy does with them is tested in tests/distributed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fabric_init.errors import FabricInitError
from fabric_init.strategies.fsdp2 import FSDP2Strategy, units_of
from fabric_init.strategies.optimizers import remap


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 10, bias=False)


def names_of(model: nn.Module, units: list[nn.Module]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[unit] for unit in units]


def test_blocks_are_the_like_entries_of_lists_that_have_children_of_their_own() -> None:
    model = Model()
    assert sorted(names_of(model, units_of(model, "blocks"))) == ["blocks.0", "blocks.1", "blocks.2"]


def test_units_by_size_are_the_innermost_modules_that_are_large_enough() -> None:
    model = Model()
    each = sum(p.numel() for p in Block().parameters())
    assert sorted(names_of(model, units_of(model, each))) == ["blocks.0", "blocks.1", "blocks.2"]
    assert "blocks.0.up" in names_of(model, units_of(model, 8 * 32))


@pytest.mark.parametrize("units", [Block, [Block], (Block,), lambda module: isinstance(module, Block)])
def test_units_by_class_and_by_callable(units: object) -> None:
    model = Model()
    assert sorted(names_of(model, units_of(model, units))) == ["blocks.0", "blocks.1", "blocks.2"]  # type: ignore[arg-type]


def test_inner_units_come_before_outer_ones() -> None:
    model = Model()
    names = names_of(model, units_of(model, (Block, nn.Linear)))
    assert names.index("blocks.0.up") < names.index("blocks.0")


def test_a_unit_never_splits_a_tie() -> None:
    model = Model()
    model.blocks[0].up.weight = model.blocks[2].up.weight
    assert names_of(model, units_of(model, "blocks")) == ["blocks.1"]
    model.head.weight = model.embedding.weight
    assert "head" not in names_of(model, units_of(model, nn.Linear))


def test_units_that_are_none_of_these_are_refused() -> None:
    with pytest.raises(FabricInitError, match="units=None"):
        units_of(Model(), None)  # type: ignore[arg-type]


def test_an_optimizer_that_has_taken_steps_is_not_remapped() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    remap(optimizer, dict(model.named_parameters()), dict(other.named_parameters()))
    assert optimizer.param_groups[0]["params"] == list(other.parameters())
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(FabricInitError, match="has taken steps"):
        remap(optimizer, dict(other.named_parameters()), dict(model.named_parameters()))


def test_the_strategy_takes_all_ranks_for_sharding() -> None:
    strategy = FSDP2Strategy(units=Block, cpu_offload=True, reshard_after_forward=False)
    assert strategy._tensor_parallel_size == 1
    assert strategy._data_parallel_size == "auto"
