"""What a real run then reads and holds is what ``forecast`` has said, strategy by strategy."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fabric_init import Fabric, forecast
from fabric_init.strategies import DeepSpeedStrategy
from tests.support.ranks import run_ranks_each
from tests.support.zoo import Block, Transformerish, launch, loss_of, set_up, tokens

# Large enough that what the interpreter reads by the way is less than a percent; no dimension divides evenly.
LARGE = partial(Transformerish, width=254, inside=1021, depth=6)
SMALL = partial(Transformerish, width=6, inside=13, depth=2)

CASES = {
    2: [
        ("ddp", "32-true"),
        ("fsdp", "bf16-true"),
        ("fsdp2", "bf16-true"),
        ("fsdp2", "bf16-mixed"),
        ("deepspeed_stage_1", "bf16-true"),
        ("deepspeed_stage_2", "32-true"),
        ("deepspeed_stage_3", "32-true"),
        ("deepspeed_stage_3", "bf16-true"),
    ],
    4: [("fsdp2", "32-true"), ("deepspeed_stage_3", "bf16-true")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, build in (("large", LARGE), ("small", SMALL)):
        save_file({key: value.clone() for key, value in build().state_dict().items()}, folder / f"{name}.safetensors")
    return folder


def read_and_train(strategy: str, precision: str, folder: Path) -> dict[str, int]:
    """Bytes that this rank reads of the checkpoint, and holds between a backward pass and its step."""
    load(strategy, precision, SMALL, folder / "small.safetensors")  # imports what is needed on the way
    gc.collect()
    held, read = held_by_tensors(), read_calls()
    fabric, model, optimizer = load(strategy, precision, LARGE, folder / "large.safetensors")
    read = read_calls() - read
    for last in (False, True):
        fabric.backward(loss_of(model, tokens(0)))
        if not last:
            optimizer.step()
            optimizer.zero_grad()
    grads = [parameter.grad for parameter in model.parameters()]  # now each is an object that can be found
    gc.collect()
    kept = held_by_tensors() - held
    assert len(grads) == len(list(model.parameters()))
    return {"read": read, "kept": kept}


def load(strategy: str, precision: str, build: Callable[[], nn.Module], path: Path) -> tuple[Fabric, Any, Any]:
    fabric = launch(strategy, precision)
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        fabric.strategy.config["zero_optimization"]["reduce_bucket_size"] = 1000  # it would hide all else
    with fabric.init_module(checkpoint=path, mmap=False):
        model = build()
    return fabric, *set_up(fabric, model, lambda model: torch.optim.AdamW(model.parameters()))


def read_calls() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split(maxsplit=2)[1])


def held_by_tensors() -> int:
    """Bytes of all tensors on the CPU that live in this process."""
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and type(one) is not DTensor]
    with torch._C.DisableTorchFunction():
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found if t.device.type == "cpu"}
    return sum(storages.values())


@pytest.mark.parametrize("world_size", CASES)
def test_a_real_run_reads_and_keeps_what_was_forecast(world_size: int, folder: Path) -> None:
    cases = {case: dict(zip(("strategy", "precision"), case, strict=True)) for case in CASES[world_size]}
    found = run_ranks_each(world_size, read_and_train, cases, folder=folder)
    boundary = max(parameter.nbytes for parameter in LARGE().parameters())
    for case, ranks in found.items():
        expected = forecast(LARGE, folder / "large.safetensors", devices=world_size, units=Block, **cases[case])
        assert expected.complete
        for rank, mine in enumerate(ranks):
            assert mine["read"] == pytest.approx(expected.reading.by_rank[rank], rel=0.01), f"{case}, rank {rank}"
            # ZeRO-1 and 2 keep the gradient of a parameter that two ranks share on both
            more = boundary if case[0] in ("deepspeed_stage_1", "deepspeed_stage_2") else 0
            assert mine["kept"] < expected.memory.kept * 1.01 + more, f"{case}, rank {rank}"
        assert max(mine["kept"] for mine in ranks) > expected.memory.kept * 0.99, case
