"""Real ranks of plain PyTorch: what one rank has not written is an error on all of them before the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_init import UninitializedTensorError, deferred_init
from fabric_init.sharding.dtensor import local
from tests.support.ranks import run_ranks_each

SECONDS = 20.0
"""Within which a rank has to hear of the error of another."""


class Net(nn.Module):
    """A model with a tensor of one element, of which all ranks but one hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x)) * self.temperature
        return y


def by_fsdp(model: nn.Module) -> None:
    fully_shard(model)


def by_module(model: Any) -> None:
    inner = getattr(model, "model", model)
    for each in (inner.up, inner.down, model):
        fully_shard(each)


def hybrid(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards")))


def over_tensor_parallel(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])


class Wrapper(nn.Module):
    """What is around the model, and was built with values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y


def copied(model: nn.Module, left_out: str) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != left_out:
                local(parameter).copy_(torch.ones_like(local(parameter), device="cpu"))


def nothing_left_out(model: nn.Module, left_out: str) -> None:
    copied(model, "")


def loaded(model: nn.Module, left_out: str) -> None:
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name != left_out}
    model.load_state_dict(state, strict=False)


def written_on_one_rank(model: nn.Module, left_out: str) -> None:
    copied(model, left_out if dist.get_rank() else "")


def outcome(
    shard: Callable[[nn.Module], None], write: Callable[[nn.Module, str], None], left_out: str, *, wrapped: bool = False
) -> str:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    with deferred_init():
        model = Net()
    whole: nn.Module = Wrapper(model) if wrapped else model
    shard(whole)
    write(model, left_out)
    begin = time.monotonic()
    try:
        for _ in range(2):
            whole(torch.ones(2, 4))
    except UninitializedTensorError as error:
        assert time.monotonic() - begin < SECONDS
        return str(error)
    return ""


SHARDS = (by_fsdp, by_module, hybrid)
EVERY = {
    f"{shard.__name__}-{left_out}-{write.__name__}-{wrapped}": {
        "shard": shard,
        "write": write,
        "left_out": left_out,
        "wrapped": wrapped,
    }
    for wrapped in (False, True)
    for shard in SHARDS
    for left_out, write in (("temperature", copied), ("up.weight", copied), ("up.weight", written_on_one_rank))
}
EVERY["over_tensor_parallel-up.weight"] = {
    "shard": over_tensor_parallel,
    "write": written_on_one_rank,
    "left_out": "up.weight",
}


def test_a_tensor_that_was_left_out_on_some_rank_is_the_same_error_on_all() -> None:
    for case, errors in run_ranks_each(2, outcome, EVERY).items():
        left_out = case.split("-")[1]
        assert len(set(errors)) == 1, (case, errors)
        assert left_out in errors[0], (case, errors)


def test_ranks_that_have_all_run_at_once() -> None:
    cases = {
        f"{shard.__name__}-{write.__name__}": {"shard": shard, "write": write, "left_out": ""}
        for shard in (*SHARDS, over_tensor_parallel)
        for write in (nothing_left_out, loaded)
    }
    assert run_ranks_each(2, outcome, cases) == {case: ["", ""] for case in cases}
