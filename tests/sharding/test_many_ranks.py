"""Sharding a recorded model among many ranks: no more steps than among few, and each rank has its part."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from fabric_init import UninitializedTensorError, deferred_init, materialize
from tests.sharding.ways import local_part

RANK, MANY = 7, 512


@contextmanager
def sharded(world: int) -> Iterator[tuple[nn.Module, int]]:
    """A recorded model on rank 7 of so many, and how many Python functions ran to shard it."""
    with deferred_init():
        model = nn.Sequential(nn.Linear(3, MANY), nn.Linear(MANY, 2))
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal steps
        steps += event == "call"

    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(nn.Linear(1, 1), mesh=mesh)  # what the first call imports and caches
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            fully_shard(model, mesh=mesh)
        finally:
            sys.setprofile(before)
        yield model, steps
    finally:
        dist.destroy_process_group()


def test_sharding_takes_as_many_steps_for_many_ranks_as_for_few() -> None:
    with sharded(RANK + 1) as (_, few):
        pass
    with sharded(MANY) as (_, many):
        assert many < 1.5 * few  # the mesh itself has more ranks


def test_one_of_many_ranks_gets_its_part_of_a_checkpoint(tmp_path: Path) -> None:
    whole = nn.Sequential(nn.Linear(3, MANY), nn.Linear(MANY, 2)).state_dict()
    save_file(whole, tmp_path / "whole.safetensors")
    with sharded(MANY) as (model, _):
        materialize(model, checkpoint=tmp_path / "whole.safetensors", process_group=False)
        parts = {name: local_part(parameter.detach()) for name, parameter in model.named_parameters()}
    assert torch.equal(parts["0.weight"], whole["0.weight"][7:8])
    assert torch.equal(parts["0.bias"], whole["0.bias"][7:8])
    assert not parts["1.weight"].numel()  # there are two rows


def test_the_shard_of_one_of_many_ranks_refuses_to_be_read_before_it_has_values() -> None:
    with sharded(MANY) as (model, _):
        part = local_part(model[0].weight.detach())
        with pytest.raises(UninitializedTensorError, match=r"0\.weight"):
            part.sum().item()
