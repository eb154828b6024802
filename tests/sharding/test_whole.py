"""A rank of a model that was sharded while it was recorded holds what PyTorch would have cut from one with values."""

from __future__ import annotations

import functools
import os
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fabric_init import deferred_init, materialize
from tests.sharding.ways import WAYS, Way, local_part
from tests.support.ranks import run_ranks

LOADS = ("checkpoint", "missing head", "from scratch")
WORLDS = (1, 2, 3, 8)

# -- every way, on every rank of worlds that one process each simulates ------------------------------------------------


def options(load: str, folder: Path, way: Way) -> dict[str, Any]:
    """Return the arguments of ``materialize`` for ``load``, whose file this writes."""
    if load == "from scratch":
        return {}
    torch.manual_seed(1)
    state = {name: value + 1 for name, value in way.model().state_dict().items()}
    if "head.weight" in state and state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr():
        del state["head.weight"]
    if load == "missing head":
        state = {name: value for name, value in state.items() if not name.startswith(("head", "blocks.1.down"))}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
    return {"checkpoint": folder / "model.safetensors", "strict": load == "checkpoint"}


def recorded_model(way: Way) -> nn.Module:
    torch.manual_seed(3)
    with deferred_init():
        return way.model()


def on_simulated_rank() -> dict[tuple[str, str], list[str]]:
    """Return what is wrong on this rank after each load of a model that was sharded in each of ``WAYS``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    wrong = {}
    for name, way in WAYS.items():
        for load in LOADS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    wrong[name, load] = differences(way, world, options(load, Path(folder), way))
                except Exception:
                    wrong[name, load] = [traceback.format_exc()]
    return wrong


def differences(way: Way, world: int, arguments: dict[str, Any]) -> list[str]:
    with_values, model = recorded_model(way), recorded_model(way)
    materialize(with_values, process_group=False, **arguments)
    way.shard(with_values, world, None)
    way.shard(model, world, way.source)
    materialize(model, process_group=False, **arguments)
    wanted = dict([*with_values.named_parameters(remove_duplicate=False), *with_values.named_buffers()])
    found = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers()])
    return [name for name in wanted.keys() | found.keys() if not alike(found.get(name), wanted.get(name))]


def alike(found: torch.Tensor | None, wanted: torch.Tensor | None) -> bool:
    if found is None or wanted is None or type(found) is not type(wanted):
        return False
    if isinstance(found, DTensor) and isinstance(wanted, DTensor) and found._spec != wanted._spec:
        return False
    here, there = local_part(found.detach()), local_part(wanted.detach())
    return (
        found.requires_grad == wanted.requires_grad
        and type(here) is torch.Tensor
        and here.dtype == there.dtype
        and here.stride() == there.stride()
        and torch.equal(here, there)
    )


@functools.cache
def simulated(world: int) -> list[dict[tuple[str, str], list[str]]]:
    return run_ranks(world, on_simulated_rank, seconds=300)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_rank_holds_what_pytorch_cuts_from_a_model_with_values(way: str, world: int) -> None:
    wrong = {(rank, load): found[way, load] for rank, found in enumerate(simulated(world)) for load in LOADS}
    assert {where: names for where, names in wrong.items() if names} == {}
