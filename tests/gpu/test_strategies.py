"""DDP, FSDP and FSDP2 on CUDA: each rank holds what one CUDA device would hold, in the right memory, and trains alike.

With one device they run in one rank; with two or more, in two ranks as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from fabric_init import Fabric, deferred_init, materialize
from fabric_init.strategies import FSDP2Strategy, FSDPStrategy
from tests.support.ranks import run_ranks
from tests.support.zoo import (
    LEFT_OUT,
    MODELS,
    Block,
    assert_close,
    assert_same,
    build,
    default_dtype,
    inner,
    loss_of,
    tokens,
    weights,
    write_checkpoint,
)


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return ""


NO_CUDA = _why_no_cuda()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA or "cuda works")]

STRATEGIES = ["ddp", "fsdp", "fsdp_cpu_offload", "fsdp2", "fsdp2 offloaded"]
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
in_one_rank_and_two = pytest.mark.parametrize("world_size", [1, 2][: max(1, torch.cuda.device_count())])


def launch(strategy: str, precision: Any = "32-true") -> Fabric:
    chosen: Any = {
        "fsdp": FSDPStrategy(auto_wrap_policy={Block}),
        "fsdp2 offloaded": FSDP2Strategy(cpu_offload=True),
    }.get(strategy, strategy)
    devices = int(os.environ["WORLD_SIZE"])
    fabric = Fabric(accelerator="cuda", devices=devices, strategy=chosen, precision=precision)
    fabric.launch()
    assert isinstance(fabric.strategy, FSDPStrategy) == (strategy in ("fsdp", "fsdp_cpu_offload"))
    return fabric


def one_device(fabric: Fabric, name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """The model as one device of this kind makes it; seed 1, as ``build`` has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        with default_dtype(dtype), deferred_init():
            model = MODELS[name]()
        materialize(model, device=fabric.device, **options)
    return model


def kept_on(model: nn.Module) -> set[str]:
    """The kinds of device that parameters are on; pinned memory is a kind of its own."""
    found = set()
    for parameter in inner(model).parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel():
            found.add("pinned" if local.device.type == "cpu" and local.is_pinned() else local.device.type)
    return found


def fill_and_train(strategy: str, name: str, precision: str, path: Path | None) -> set[str]:
    fabric = launch(strategy, precision)
    options: dict[str, Any] = {"empty_init": True} if path is None else {"checkpoint": path, "strict": False}
    expected = one_device(
        fabric, name, PRECISIONS[precision], **({} if path is None else {"checkpoint": path, "strict": False})
    )
    model = build(fabric, name, **options)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = fabric.setup(model, optimizer)
    if path is None:
        fabric.init_missing(model)
    assert_same(weights(model), weights(expected))
    if path is not None:
        statuses = {row.name: row.status for row in fabric.init_report(model).rows}
        assert {statuses[key] for key in LEFT_OUT[name] if key in statuses} == {"initialized"}
    reference = torch.optim.SGD(expected.parameters(), lr=0.1)
    if precision == "32-true":
        for step in range(3):
            batch = tokens(step, 2 * fabric.world_size).to(fabric.device)
            loss_of(expected, batch).backward()
            reference.step()
            reference.zero_grad()
            fabric.backward(loss_of(model, batch[fabric.global_rank * 2 :][:2]))
            optimizer.step()
            optimizer.zero_grad()
        assert_close(weights(model), weights(expected), rtol=1e-3, atol=1e-4)
    else:
        assert loss_of(model, tokens(0).to(fabric.device)).isfinite()
    return kept_on(model)


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "from scratch"])
@pytest.mark.parametrize("precision", PRECISIONS)
@in_one_rank_and_two
@in_every_strategy
def test_ranks_hold_what_one_device_holds_and_train_alike(
    strategy: str, world_size: int, precision: str, checkpoint: bool, tmp_path: Path
) -> None:
    name = "even" if precision == "32-true" else "uneven"
    path = write_checkpoint(tmp_path / "model.safetensors", name, partial=True) if checkpoint else None
    arguments: dict[str, Any] = {"strategy": strategy, "name": name, "precision": precision, "path": path}
    for found in run_ranks(world_size, fill_and_train, seconds=180, **arguments):
        assert found <= ({"cpu", "pinned"} if "offload" in strategy else {"cuda"})


# -- memory of the device ----------------------------------------------------------------------------------------------

WIDTH, DEPTH = 1024, 8


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(DEPTH))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def peak(strategy: str, path: Path) -> tuple[int, int]:
    chosen = FSDPStrategy(auto_wrap_policy={nn.Sequential}) if strategy == "fsdp" else FSDP2Strategy(nn.Sequential)
    devices = int(os.environ["WORLD_SIZE"])
    fabric = Fabric(accelerator="cuda", devices=devices, strategy=chosen)
    fabric.launch()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with fabric.init_module(checkpoint=path):
        model = Stack()
    assert torch.cuda.max_memory_allocated() == before, "recording takes no memory"
    model = fabric.setup(model)
    wrapped = sum(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    assert wrapped == (DEPTH + 1 if strategy == "fsdp" else 0)
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@in_one_rank_and_two
def test_a_rank_never_holds_more_than_its_shards_and_one_unit(strategy: str, world_size: int, tmp_path: Path) -> None:
    torch.save(Stack().state_dict(), tmp_path / "model.pt")
    unit = 4 * WIDTH * WIDTH
    units = 2 if strategy == "fsdp" else 1  # FSDP copies the unit's parameters into one tensor
    for most, after in run_ranks(world_size, peak, seconds=180, strategy=strategy, path=tmp_path / "model.pt"):
        assert after < DEPTH * unit // world_size + (1 << 20)
        assert most < after + units * unit + (1 << 20)
