"""Real ranks of plain PyTorch: what one rank has not written is an error on all of them before the model runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_init import UninitializedTensorError, deferred_init, materialize
from fabric_init.distributed import posted
from fabric_init.sharding.dtensor import local
from tests.support.ranks import run_ranks, run_ranks_each

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


# -- ranks that fill, shard or run the model differently ---------------------------------------------------------------


def values() -> dict[str, Tensor]:
    return {name: torch.full_like(value, 0.5) for name, value in Net().state_dict().items()}


def whole_by_load(model: nn.Module) -> None:
    model.load_state_dict(values())


def whole_by_writes(model: nn.Module) -> None:
    with torch.no_grad():
        for name, value in values().items():
            model.get_parameter(name).copy_(value)


def whole_from_scratch(model: nn.Module) -> None:
    materialize(model, process_group=False)
    whole_by_load(model)


def shards_by_writes(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).fill_(0.5)


def shards_from_rank_zero(model: nn.Module) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, values() if dist.get_rank() == 0 else {}, options=options)


def fill_before_sharding_on_rank_zero(
    before: Callable[[nn.Module], None],
    shard: Callable[[nn.Module], None],
    after: Callable[[nn.Module], None],
    *,
    wrapped: bool,
) -> Tensor:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    with deferred_init():
        model = Net()
    if dist.get_rank() == 0:
        before(model)
    whole: nn.Module = Wrapper(model) if wrapped else model
    shard(whole)
    if dist.get_rank() != 0 or after.__name__ == "shards_from_rank_zero":
        after(model)
    y: Tensor = whole(torch.ones(2, 4))
    return y.detach()


def test_rank_zero_may_have_all_values_before_the_model_is_sharded() -> None:
    cases = {
        f"{before.__name__}-{shard.__name__}-{after.__name__}-{wrapped}": {
            "before": before,
            "shard": shard,
            "after": after,
            "wrapped": wrapped,
        }
        for before in (whole_by_load, whole_by_writes, whole_from_scratch)
        for shard in (by_fsdp, by_module)
        for after in (shards_by_writes, shards_from_rank_zero)
        for wrapped in (False, True)
        if not (wrapped and after is shards_from_rank_zero)  # torch wants the root
    }
    model = Net()
    model.load_state_dict(values())
    wanted = model(torch.ones(2, 4)).detach()
    for case, found in run_ranks_each(2, fill_before_sharding_on_rank_zero, cases).items():
        assert [torch.equal(each, wanted) for each in found] == [True, True], case


class Crossing(nn.Module):
    """A model of two tensors, each of which is sharded in one direction alone."""

    def __init__(self) -> None:
        super().__init__()
        self.across, self.down = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self) -> Tensor:
        y: Tensor = self.across.full_tensor() * self.down.full_tensor()  # type: ignore[operator]
        return y


def run_on_crossing_meshes(left_out: str, odd: int) -> str:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("down", "across"))
    with deferred_init():
        model = Crossing()
    for name in ("across", "down"):
        sharded = distribute_tensor(model.get_parameter(name), mesh[name], [Shard(0)])
        setattr(model, name, nn.Parameter(sharded))
    copied(model, left_out if dist.get_rank() == odd else "")
    try:
        assert model().tolist() == [1.0] * 4
    except UninitializedTensorError as error:
        return str(error)
    return ""


def test_ranks_that_are_connected_only_through_others_hear_of_an_error() -> None:
    cases = {(name, odd): {"left_out": name, "odd": odd} for name in ("across", "down") for odd in (0, 3)}
    found = run_ranks_each(4, run_on_crossing_meshes, {**cases, ("", 0): {"left_out": "", "odd": 0}})
    assert found.pop(("", 0)) == [""] * 4
    for (name, odd), errors in found.items():
        assert len(set(errors)) == 1, (name, odd, errors)
        assert f"\n  {name}\n" in errors[0]


def run_one_replica_first() -> list[float]:
    dist.init_process_group("gloo")
    with deferred_init():
        model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    copied(model, "")
    with torch.no_grad():
        first = model(torch.ones(2, 4)).flatten().tolist() if dist.get_rank() < 2 else []
    dist.barrier()
    found: list[float] = first or model(torch.ones(2, 4)).flatten().tolist()
    return found


def test_a_replica_runs_while_the_others_do_not() -> None:
    first, *others = run_ranks(4, run_one_replica_first)
    assert others == [first] * 3


def lack_one_alone(left_out: str) -> str:
    posted.PATIENCE = timedelta(seconds=0.2)
    dist.init_process_group("gloo")
    with deferred_init():
        model = Net()
    fully_shard(model)
    copied(model, left_out if dist.get_rank() else "")
    if dist.get_rank() == 0:
        dist.barrier()
        return ""
    try:
        model(torch.ones(2, 4))
    except UninitializedTensorError as error:
        return str(error)
    finally:
        dist.barrier()
    return ""


def test_an_error_waits_for_a_rank_that_does_not_run_the_model_for_a_moment_only() -> None:
    assert "up.weight" in run_ranks(2, lack_one_alone, left_out="up.weight")[1]
