"""Ranks that hold different parts of one model: pipeline stages, and experts on a mesh of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fabric_init import deferred_init, materialize
from tests.sharding.test_plain_pytorch import assert_same, gathered, rank_here
from tests.support.ranks import run_ranks

EXPERTS, WIDTH = 4, 6


class Layer(nn.Module):
    """Attention is for all; each of the experts is a slice of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.empty(EXPERTS, WIDTH, 2 * WIDTH))
        self.experts.down = nn.Parameter(torch.empty(EXPERTS, 2 * WIDTH, WIDTH))

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.attention.weight, std=0.02)
        nn.init.zeros_(self.attention.bias)
        nn.init.trunc_normal_(self.experts.up, std=0.02)
        nn.init.trunc_normal_(self.experts.down, std=0.01)


class Mixture(nn.Module):
    """A mixture of experts; a stage of a pipeline leaves out what others hold, as torchtitan's do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleDict({str(number): Layer() for number in range(2)})
        self.head = nn.Linear(WIDTH, 10, bias=False)

    def init_weights(self) -> None:
        for part in (self.embedding, self.head):
            if part is not None:
                nn.init.normal_(part.weight)
        for layer in self.layers.values():
            layer.init_weights()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Mixture()
        model.init_weights()
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


def whole(checkpoint: Path | None) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        with deferred_init():
            model = Mixture()
            model.init_weights()
        materialize(model, checkpoint=checkpoint, process_group=False)
    return gathered(model)


def shard_experts(model: nn.Module) -> None:
    """Put the experts on a mesh of their own, and shard all on another: two ranks share each expert's rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    for layer in model.layers.values():
        for name, parameter in list(layer.experts.named_parameters()):
            sharded = distribute_tensor(parameter, mesh["expert"], [Shard(0)])
            layer.experts.register_parameter(name, nn.Parameter(sharded))
        fully_shard(layer.experts, mesh=mesh["data"], shard_placement_fn=lambda _: Shard(1))
        fully_shard(layer, mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))


def experts(in_the_block: bool, checkpoint: Path | None) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    with deferred_init():
        model = Mixture()
        if in_the_block:
            shard_experts(model)
        model.init_weights()
    if not in_the_block:
        shard_experts(model)
    materialize(model, checkpoint=checkpoint)
    up = model.layers["0"].experts.up
    assert isinstance(up, DTensor)
    assert up.to_local().shape == (EXPERTS // 2, WIDTH // 2, 2 * WIDTH)
    return gathered(model)


@pytest.mark.parametrize("from_scratch", [True, False], ids=["from scratch", "checkpoint"])
def test_experts_on_a_mesh_of_their_own_hold_their_part(from_scratch: bool, path: Path) -> None:
    checkpoint = None if from_scratch else path
    wanted = whole(checkpoint)
    for found in run_ranks(4, experts, in_the_block=from_scratch, checkpoint=checkpoint):
        assert_same(found, wanted)


def stage(path: Path) -> dict[str, Tensor]:
    dist.init_process_group("gloo")
    torch.manual_seed(3)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    number, group = rank_here() // 2, mesh["data"].get_group()
    with deferred_init():
        model = Mixture()
        model.init_weights()
    del model.layers[str(1 - number)]
    if number == 0:
        model.head = None
    else:
        model.embedding = None
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    own = model.state_dict().keys()
    materialize(
        model,
        checkpoint=path,
        rename=lambda key: key if key in own and "attention" not in key else None,
        strict=False,
        process_group=group,
    )
    return gathered(model)


def test_sharded_stages_of_a_pipeline_fill_their_own_part(path: Path) -> None:
    loaded, drawn = whole(path), whole(None)
    wanted = {name: drawn[name] if "attention" in name else loaded[name] for name in loaded}
    for rank, found in enumerate(run_ranks(4, stage, path=path)):
        number = rank // 2
        its = ("embedding", "layers.0") if number == 0 else ("head", "layers.1")
        assert_same(found, {name: value for name, value in wanted.items() if name.startswith(its)})
