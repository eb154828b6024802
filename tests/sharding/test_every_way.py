"""A rank of a model that was sharded while it was recorded holds what PyTorch would have cut from one with values.

Every way to shard, on every rank of several worlds. Each rank is a process that takes itself for one, with torch's fake
process group: nothing of this needs ranks to talk. Without ``--whole``, two ranks take every way, other worlds some.
"""

from __future__ import annotations

import functools
import os
import tempfile
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from fabric_init import materialize
from tests.sharding.ways import WAYS, Way, local_part, options, recorded_model
from tests.support.ranks import run_ranks

ALL_LOADS = ("checkpoint", "missing head", "from scratch")
LOADS = {1: ("missing head",), 2: ALL_LOADS, 3: ALL_LOADS, 8: ("missing head",)}
"""By the number of ranks. With some keys missing, some tensors are loaded and some initialized."""
SAMPLE = {1: list(WAYS)[::5], 2: list(WAYS), 3: list(WAYS)[1::5], 8: list(WAYS)[2::4]}


def on_simulated_rank(ways: list[str]) -> dict[tuple[str, str], list[str]]:
    """Return what is wrong on this rank after each load of a model that was sharded in each of ``ways``."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    wrong = {}
    for name, load in product(ways, LOADS[world]):
        way = WAYS[name]
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
        and (here.stride() == there.stride() or not here.numel())
        and torch.equal(here, there)
    )


@functools.cache
def simulated(world: int, whole: bool) -> list[dict[tuple[str, str], list[str]]]:
    return run_ranks(world, on_simulated_rank, ways=list(WAYS) if whole else SAMPLE[world], seconds=300)


@pytest.mark.sweep(*(f"{way}-{world}" for world, ways in SAMPLE.items() for way in ways))
@pytest.mark.parametrize("world", LOADS)
@pytest.mark.parametrize("way", WAYS)
def test_every_rank_holds_what_pytorch_cuts_from_a_model_with_values(way: str, world: int, whole: bool) -> None:
    found_by_rank = simulated(world, whole)
    wrong = {(rank, load): found[way, load] for rank, found in enumerate(found_by_rank) for load in LOADS[world]}
    assert {where: names for where, names in wrong.items() if names} == {}
