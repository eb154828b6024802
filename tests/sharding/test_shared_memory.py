"""Parameters that are views of one memory, sharded before they have values: each shard has memory of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing._internal.distributed.fake_pg import FakeStore

from fabric_init import deferred_init, materialize
from fabric_init.errors import RecordingError
from tests.sharding.ways import local_part
from tests.support.ranks import run_ranks


def through_a_vector(model: nn.Module) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).clone(), model.parameters())


def into_a_buffer(model: nn.Module) -> None:
    parameters, start = list(model.parameters()), 0
    memory = torch.empty(sum(parameter.numel() for parameter in parameters))
    for parameter in parameters:
        view = memory[start : start + parameter.numel()].view_as(parameter)
        view.copy_(parameter.data)
        parameter.data = view
        start += parameter.numel()


def at_the_root(model: nn.Module) -> None:
    fully_shard(model)


def layer_by_layer(model: nn.Module) -> None:
    for each in (*model.children(), model):
        fully_shard(each)


def build(change: Callable[[nn.Module], None]) -> nn.Module:
    """Layers of one shape, and a parameter that one rank alone has a part of."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.PReLU(), nn.PReLU())
    with torch.no_grad():
        change(model)
    return model


def parts(model: nn.Module) -> list[torch.Tensor]:
    return [local_part(parameter.detach()) for parameter in model.parameters()]


def on_simulated_rank(path: Path) -> list[tuple[str, str, bool]]:
    """Return for which ways this rank holds something else than in plain PyTorch."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    wrong = []
    for change, shard, from_file in product(
        (through_a_vector, into_a_buffer), (at_the_root, layer_by_layer), (False, True)
    ):
        wanted = build(change)
        if from_file:
            wanted.load_state_dict(load_file(path))
        shard(wanted)
        with deferred_init(rng="eager"):
            model = build(change)
        shard(model)
        materialize(model, checkpoint=path if from_file else None, process_group=False)
        if not all(map(torch.equal, parts(model), parts(wanted))):
            wrong.append((change.__name__, shard.__name__, from_file))
    return wrong


def test_a_model_whose_parameters_share_memory_is_sharded_as_in_plain_pytorch(tmp_path: Path) -> None:
    state = build(through_a_vector).state_dict()
    save_file({name: torch.randn_like(value) for name, value in state.items()}, tmp_path / "model.safetensors")
    assert run_ranks(3, on_simulated_rank, path=tmp_path / "model.safetensors") == [[]] * 3


def views_after_the_block() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    with deferred_init():
        model = build(lambda _: None)
    through_a_vector(model)
    at_the_root(model)
    with pytest.raises(RecordingError, match=r"shard of 0\.weight was .*vector_to_parameters"):
        materialize(model, process_group=False)


def test_views_that_are_made_after_the_block_are_refused_by_name() -> None:
    run_ranks(1, views_after_the_block)
