"""Ctrl-C, a disk error, no memory: on one rank or on all of them, in the middle of a fill. The processes go on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_init import CheckpointError, FabricInitError, OutOfMemoryError, UninitializedTensorError
from tests.support.ranks import run_ranks
from tests.support.watched import watched
from tests.support.zoo import Uneven, assert_same, build, launch, one_device, tokens, weights, write_checkpoint

SECONDS = 15.0


def disk_error() -> None:
    raise OSError(5, "Input/output error")


def no_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


MISHAPS: dict[str, tuple[Callable[[], None], type[BaseException], str]] = {
    "disk": (disk_error, CheckpointError, "CheckpointError: .*Input/output error"),
    "memory": (no_memory, OutOfMemoryError, "allocate memory"),
    "ctrl-c": (press_ctrl_c, KeyboardInterrupt, "KeyboardInterrupt"),
}


AT = 3
"""The read at which it happens."""


def fail_and_go_on(strategy: str, io: Any, path: Path, cases: list[tuple[str, list[int]]]) -> list[float]:
    """Each case, then a good load, all in the same processes; how long each failure took to be known."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that these processes come from ignores it
    rank, seconds = int(os.environ["RANK"]), []
    fabric = launch(strategy, io=io)
    expected = weights(one_device("uneven", checkpoint=path))
    for name, ranks in cases:
        mishap, kind, text = MISHAPS[name]
        here = AT if rank in ranks else -1
        watched(lambda count, mishap=mishap, here=here: mishap() if count == here else None)
        models: list[Any] = []
        if rank in ranks:
            caught = pytest.raises(kind)
        else:
            caught = pytest.raises(FabricInitError, match=f"failed on rank {ranks[0]}, so all ranks stop(.|\n)*{text}")
        start = time.monotonic()
        with caught:
            with fabric.init_module(checkpoint=path):
                models.append(Uneven())
            fabric.setup(models[0])
        seconds.append(time.monotonic() - start)
        if rank not in ranks and strategy == "ddp" and io == "local":  # this rank had finished when it heard
            assert_same(weights(models[0]), expected)
            models[0](tokens(1))
        else:
            with pytest.raises(UninitializedTensorError):
                models[0](tokens(1))
            with pytest.raises(UninitializedTensorError):
                torch.save(models[0].state_dict(), BytesIO())
        watched()
        assert_same(weights(fabric.setup(build(fabric, "uneven", checkpoint=path))), expected)
    return seconds


@pytest.mark.parametrize("io", ["local", "broadcast"])
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_every_rank_hears_of_it_and_goes_on(strategy: str, io: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "uneven")
    cases = [("disk", [0]), ("ctrl-c", [0]), ("memory", [0])]
    if io == "local":
        cases += [("ctrl-c", [0, 1]), ("ctrl-c", [1]), ("disk", [0, 1])]
    for seconds in run_ranks(2, fail_and_go_on, strategy=strategy, io=io, path=path, cases=cases):
        assert max(seconds) < SECONDS
