"""Bytes and seconds, rank by rank. That they are those of a real run, ``distributed/test_forecast.py`` shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fabric_init import forecast
from fabric_init.checkpoints import Fuse, Region
from fabric_init.checkpoints.region import take
from fabric_init.tools.forecast.strategy_costs import STRATEGIES

REGIONS = {name: model.region for name, model in STRATEGIES.items() if model.region is not None}


def linear() -> nn.Module:
    return nn.Linear(3, 10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({name: value.clone() for name, value in linear().state_dict().items()}, tmp_path / "linear.safetensors")
    return tmp_path / "linear.safetensors"


WEIGHT, BIAS = 10 * 3 * 4, 10 * 4


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", [WEIGHT + BIAS] * 4),
        ("fsdp", [WEIGHT + BIAS] * 4),
        ("deepspeed_stage_2", [WEIGHT + BIAS] * 4),
        ("fsdp2", [3 * 16, 3 * 16, 3 * 16, 1 * 16]),  # rows
        ("deepspeed_stage_3", [8 * 4 + 3 * 4, 8 * 4 + 3 * 4, 8 * 4 + 3 * 4, 6 * 4 + 1 * 4]),  # elements
    ],
)
def test_each_rank_reads_what_its_strategy_keeps(strategy: Any, expected: list[int], path: Path) -> None:
    reading = forecast(linear, path, strategy=strategy, devices=4).reading
    assert list(reading.by_rank) == expected
    assert reading.way == "local"
    assert reading.from_storage == WEIGHT + BIAS, "the ranks of one machine share what it has read"


@pytest.mark.parametrize("strategy", REGIONS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("shape", [(1,), (5,), (7, 3), (16, 2, 2), (0, 3)])
def test_the_parts_of_all_ranks_make_up_the_tensor(strategy: str, world_size: int, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    regions: list[Region] = [REGIONS[strategy](tensor.shape, rank, world_size) for rank in range(world_size)]
    parts = [take(tensor, region).flatten() for region in regions]
    assert torch.equal(torch.cat(parts), tensor.flatten())


def test_fsdp2_cuts_as_torch_chunks() -> None:
    tensor = torch.arange(21).reshape(7, 3)
    for rank, chunk in enumerate(tensor.chunk(4)):
        assert torch.equal(take(tensor, REGIONS["fsdp2"](tensor.shape, rank, 4)), chunk)


def test_machines_each_fetch_what_their_ranks_read(path: Path) -> None:
    whole = forecast(linear, path, strategy="ddp", devices=2, nodes=3, io="local").reading
    assert whole.from_storage == 3 * (WEIGHT + BIAS)
    cut = forecast(linear, path, strategy="fsdp2", devices=1, nodes=2).reading
    assert cut.from_storage == WEIGHT + BIAS


def test_one_reader_sends_to_the_others(path: Path) -> None:
    reading = forecast(linear, path, strategy="ddp", devices=3, io="broadcast").reading
    assert reading.by_rank == (WEIGHT + BIAS, 0, 0)
    assert reading.way == "broadcast"


def test_seconds_are_those_of_the_slowest_rank_and_of_all_together(path: Path) -> None:
    reading = forecast(linear, path, strategy="fsdp2", devices=4, bandwidth=16.0).reading
    assert (reading.seconds, reading.seconds_shared) == (3.0, 10.0)
    assert forecast(linear, path).reading.seconds is None


def test_ties_are_compared_and_so_read_under_each_name(
    build: Callable[[], nn.Module], save: Callable[..., Path]
) -> None:
    both = forecast(build, save()).reading.by_rank[0]
    one = forecast(build, save({"head.weight": None})).reading.by_rank[0]
    assert both - one == 160


def test_what_does_not_fit_or_is_missing_is_not_read(build: Callable[[], nn.Module], save: Callable[..., Path]) -> None:
    path = save({"layers.0.weight": torch.zeros(4, 5), "norm.weight": None, "head.weight": None})
    coverage = forecast(build, path).coverage
    assert forecast(build, path).reading.by_rank == (coverage.loaded.bytes,)


def test_bytes_are_those_of_the_checkpoint_not_of_the_model(path: Path) -> None:
    assert forecast(linear, path, precision="bf16-true").reading.by_rank == (WEIGHT + BIAS,)


def test_of_converted_tensors_the_region_is_read(tmp_path: Path) -> None:
    parts = {f"{name}.weight": torch.zeros(2, 3) for name in "abcd"}
    save_file(parts, tmp_path / "parts.safetensors")
    fuse = Fuse([f"{name}.weight" for name in "abcd"], into="weight")
    found = forecast(lambda: nn.Linear(3, 8, bias=False), tmp_path, strategy="fsdp2", devices=2, convert=[fuse])
    assert found.complete
    assert found.reading.by_rank == (48, 48)


class Scaled(nn.Module):
    """What is missing from a checkpoint of ``body`` is computed from it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 10, bias=False)
        self.magnitude = nn.Parameter(self.body.weight.detach().norm(dim=1))


def test_what_others_are_computed_from_is_read_whole_on_every_rank(tmp_path: Path) -> None:
    save_file({"body.weight": torch.zeros(10, 3)}, tmp_path / "body.safetensors")
    found = forecast(Scaled, tmp_path, strategy="fsdp2", devices=2, strict=False)
    assert found.reading.by_rank == (WEIGHT // 2 + WEIGHT, WEIGHT // 2 + WEIGHT)
