"""``io="broadcast"``: rank 0 reads each tensor once for all, and the ranks hold what they would have read themselves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, try_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import NAMES, STRATEGIES, assert_same, build, inner, launch, one_device, ties, weights, write_checkpoint

from fabric_init import CheckpointError, CheckpointMismatchError, FabricInitError
from fabric_init.checkpoints import Region, open_checkpoint
from fabric_init.filling import opening
from fabric_init.filling.agreement import AllRanks, RanksLostError
from fabric_init.filling.one_reader import OneReader

FILE = "model.safetensors"
SECONDS = 15.0
in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
in_small_and_large_groups = pytest.mark.parametrize("world_size", [2, 4])


def load(strategy: str, name: str, budget: int, precision: str = "32-true", **options: Any) -> dict[str, Any]:
    opening.BUDGET = budget
    fabric = launch(strategy, precision, io="broadcast")
    model = fabric.setup(build(fabric, name, **options))
    statuses = {row.name: row.status for row in fabric.init_report(model).rows}
    return {"weights": weights(model), "ties": ties(model), "statuses": statuses}


def check(found: Sequence[dict[str, Any]], expected: nn.Module) -> None:
    for rank in found:
        assert_same(rank["weights"], weights(expected))
        assert rank["ties"] == ties(expected)


@pytest.mark.parametrize("name", NAMES)
@in_small_and_large_groups
@in_every_strategy
def test_every_rank_holds_what_is_in_the_file(strategy: str, world_size: int, name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, name)
    found = run_ranks(world_size, load, strategy=strategy, name=name, budget=1 << 20, checkpoint=path)
    check(found, one_device(name, checkpoint=path))


@pytest.mark.parametrize("budget", [64, 1000])
@pytest.mark.parametrize("file", [FILE, "model.pt"])
@in_every_strategy
def test_a_budget_smaller_than_one_tensor_will_do(strategy: str, file: str, budget: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / file, "uneven")
    found = run_ranks(4, load, strategy=strategy, name="uneven", budget=budget, checkpoint=path)
    check(found, one_device("uneven", checkpoint=path))


@pytest.mark.parametrize("name", ["uneven", "buffers"])
@in_every_strategy
@pytest.mark.parametrize(
    ("saved", "precision", "kept"),
    [(torch.bfloat16, "32-true", torch.float32), (torch.float32, "bf16-true", torch.bfloat16)],
    ids=["bf16 into fp32", "fp32 into bf16"],
)
def test_what_the_file_lacks_is_initialised_and_dtypes_are_the_models(
    saved: torch.dtype, precision: str, kept: torch.dtype, strategy: str, name: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / FILE, name, dtype=saved, partial=True)
    options: dict[str, Any] = {"checkpoint": path, "strict": False}
    found = run_ranks(2, load, strategy=strategy, name=name, budget=500, precision=precision, **options)
    check(found, one_device(name, dtype=kept, **options))
    assert {"loaded", "initialised"} <= set(found[1]["statuses"].values())
