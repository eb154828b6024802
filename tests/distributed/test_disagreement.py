"""Ranks that would not do the same: an error on every one of them, within seconds, and no hang."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.wrappers import _FabricOptimizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fabric_init import CheckpointNotFoundError, FabricInitError
from fabric_init.distributed.agreement import agreement_of
from fabric_init.errors import RanksDisagreeError
from tests.support.ranks import run_ranks, run_ranks_each, try_ranks
from tests.support.zoo import STRATEGIES, Uneven, build, launch, write_checkpoint

SECONDS = 15.0
FILE = "model.safetensors"
in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def _each_with_a_folder(folder: Path, world_size: int = 2) -> list[Path]:
    """A folder for each rank, with the same file in it: as on machines that share no disk."""
    folders = [folder / f"machine {rank}" for rank in range(world_size)]
    for each in folders:
        each.mkdir()
        write_checkpoint(each / FILE, "uneven")
    return folders


def load_own_file(strategy: str, folders: list[Path], strict: bool = True) -> bool:
    fabric = launch(strategy)
    os.chdir(folders[fabric.global_rank])
    fabric.setup(build(fabric, "uneven", checkpoint=FILE, strict=strict))
    return True


def fail_to_load(strategy: str, folders: list[Path], strict: bool = True) -> tuple[str, str, float]:
    start = time.monotonic()
    with pytest.raises(FabricInitError) as raised:
        load_own_file(strategy, folders, strict)
    return raised.type.__name__, str(raised.value), time.monotonic() - start


@in_every_strategy
def test_copies_of_one_file_are_fine(strategy: str, tmp_path: Path) -> None:
    assert run_ranks(2, load_own_file, strategy=strategy, folders=_each_with_a_folder(tmp_path)) == [True, True]


@pytest.mark.parametrize("without", [0, 1])
@in_every_strategy
def test_a_path_that_one_rank_does_not_have(strategy: str, without: int, tmp_path: Path) -> None:
    folders = _each_with_a_folder(tmp_path)
    (folders[without] / FILE).unlink()
    found = run_ranks(2, fail_to_load, strategy=strategy, folders=folders)
    assert found[without][0] == CheckpointNotFoundError.__name__
    for _, message, seconds in found:
        assert FILE in message, "every rank says what is wrong, wherever it is"
        assert seconds < SECONDS
    assert re.search(rf"\branks? \[?{without}\b", found[1 - without][1]), found[1 - without][1]


def _other_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {("unknown" if key == "mix" else key): value for key, value in state.items()}


def _other_dtypes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.bfloat16() for key, value in state.items()}


def _other_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value + 1 for key, value in state.items()}


@pytest.mark.parametrize("odd", [0, 1])
@in_every_strategy
def test_another_file_on_one_rank(strategy: str, odd: int, tmp_path: Path) -> None:
    cases = {}
    for change in (_other_keys, _other_dtypes, _other_values):
        folder = tmp_path / change.__name__
        folder.mkdir()
        folders = _each_with_a_folder(folder)
        save_file(change(load_file(folders[odd] / FILE)), folders[odd] / FILE)
        cases[change.__name__] = {"folders": folders}
    for ranks in run_ranks_each(2, fail_to_load, cases, strategy=strategy, strict=False).values():
        for _, message, seconds in ranks:
            assert "rank" in message
            assert seconds < SECONDS


class Wide(nn.Module):
    """Has a tensor that is not read at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Linear(2, 2), nn.Parameter(torch.zeros((1 << 24) + 5))

    def forward(self, x: Tensor) -> Tensor:
        return x


def load_one_of_two_copies(folders: list[Path]) -> str:
    os.chdir(folders[int(os.environ["RANK"]) % 2])  # so two of three ranks share one
    fabric = launch("ddp")
    try:
        with fabric.init_module(checkpoint="wide.safetensors"):
            model = Wide()
    except RanksDisagreeError as error:
        return str(error)
    assert model.first.bias.tolist() == [1, 1]
    return ""


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_element_of_a_copy_that_differs_is_found_and_named(ranks: int, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    state = {"first.weight": torch.ones(2, 2), "first.bias": torch.ones(2), "wide": torch.ones((1 << 24) + 5)}
    for folder in folders:
        folder.mkdir()
        save_file(state, folder / "wide.safetensors")
    assert run_ranks(ranks, load_one_of_two_copies, folders=folders) == [""] * ranks
    state["wide"][(1 << 23) + 3] = 2
    save_file(state, folders[1] / "wide.safetensors")
    for message in run_ranks(ranks, load_one_of_two_copies, folders=folders):
        assert "the content of the checkpoint is not the same on every rank" in message
        assert f"They differ in wide[0:{1 << 24}]" in message


class _Wider(Uneven):
    """As ``Uneven`` under the same names, one tensor larger."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(7, 2)


def build_different_models(strategy: str) -> float:
    fabric = launch(strategy)
    start = time.monotonic()
    kind = Uneven if fabric.global_rank == 0 else _Wider
    with pytest.raises(FabricInitError, match=r"Uneven with .*; .*_Wider with"):
        with fabric.init_module(empty_init=True):
            model = kind()
        fabric.setup(model)
    return time.monotonic() - start


@in_every_strategy
def test_different_models(strategy: str) -> None:
    assert max(run_ranks(2, build_different_models, strategy=strategy)) < SECONDS


# -- a rank that raises or dies ----------------------------------------------------------------------------------------


def raise_in_the_block(strategy: str, path: Path, odd: int) -> tuple[str, str, float]:
    """What the first attempt ends in. Both ranks live on, and try again."""
    fabric = launch(strategy)
    start = time.monotonic()
    with pytest.raises((FabricInitError, LookupError)) as raised, fabric.init_module(checkpoint=path):
        if fabric.global_rank == odd:
            raise LookupError("the user's own mistake")
        model = Uneven()
    seconds = time.monotonic() - start
    with fabric.init_module(checkpoint=path):
        model = Uneven()
    fabric.setup(model)
    return raised.type.__name__, str(raised.value), seconds


@pytest.mark.parametrize("odd", [0, 1])
@in_every_strategy
def test_a_constructor_that_raises_on_one_rank(strategy: str, odd: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "uneven")
    found = run_ranks(2, raise_in_the_block, strategy=strategy, path=path, odd=odd)
    assert found[odd][:2] == ("LookupError", "the user's own mistake")
    assert found[1 - odd][0] == "FabricInitError"
    assert found[1 - odd][1].startswith(f"building the model failed on rank {odd}, ")
    assert found[1 - odd][1].endswith(f"Rank {odd}: LookupError: the user's own mistake")
    assert max(seconds for _, _, seconds in found) < SECONDS


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(1 << 26))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.large[:4].sum()


@contextmanager
def little_memory() -> Iterator[None]:
    """Let this process have hardly more memory than it has now."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + (1 << 26), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def run_out_of_memory(strategy: str, odd: int) -> float:
    fabric = launch(strategy)
    with fabric.init_module(empty_init=True):
        model = Large()
    if fabric.global_rank == odd:
        with pytest.raises(RuntimeError, match="alloc"), little_memory():
            fabric.init_missing(model)
    fabric.init_missing(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return float(fabric.setup(model, optimizer)[0](torch.ones(())))


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_memory_that_runs_out_on_one_rank_is_no_harm_once_there_is_more(strategy: str, odd: int) -> None:
    assert run_ranks(2, run_out_of_memory, strategy=strategy, odd=odd) == [4.0, 4.0]


def raise_in_setup(strategy: str, path: Path, odd: int, mistake: str) -> tuple[str, str, float]:
    fabric = launch(strategy)
    model = build(fabric, "uneven", checkpoint=path)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if fabric.global_rank == odd:
        optimizer = _FabricOptimizer(optimizer, fabric.strategy) if mistake == "seen at once" else "no optimizer"
    start = time.monotonic()
    with pytest.raises(Exception) as raised:  # noqa: PT011  (what it is, the test looks at)
        fabric.setup(model, optimizer)
    seconds = time.monotonic() - start
    fabric.setup(build(fabric, "uneven", checkpoint=path))
    return raised.type.__name__, str(raised.value), seconds


@pytest.mark.parametrize("mistake", ["seen at once", "seen when the model is filled"])
@pytest.mark.parametrize("odd", [0, 1])
@in_every_strategy
def test_a_setup_that_raises_on_one_rank(strategy: str, odd: int, mistake: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "uneven")
    found = run_ranks(2, raise_in_setup, strategy=strategy, path=path, odd=odd, mistake=mistake)
    own, message = found[odd][:2]
    assert own != "FabricInitError"
    assert found[1 - odd][0] == "FabricInitError"
    assert found[1 - odd][1].startswith(f"setting the model up failed on rank {odd}, ")
    assert found[1 - odd][1].endswith(f"Rank {odd}: {own}: {message}")
    assert max(seconds for _, _, seconds in found) < SECONDS


def die_in_the_block(strategy: str, path: Path) -> tuple[str, float]:
    fabric = launch(strategy)
    start = time.monotonic()
    with pytest.raises(FabricInitError) as raised:
        with fabric.init_module(checkpoint=path):
            model = Uneven()
            if fabric.global_rank == 1:
                os._exit(13)
        fabric.setup(model)
    return str(raised.value), time.monotonic() - start


@in_every_strategy
def test_a_rank_that_dies(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "uneven")
    alive, dead = try_ranks(2, die_in_the_block, strategy=strategy, path=path)
    assert dead.error == "no result: exit status 13"
    assert not alive.error, alive.error + alive.output
    message, seconds = alive.value
    assert "rank" in message
    assert seconds < SECONDS


def end_in_a_collective(mistakes: tuple[str, str]) -> str:
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))

    def set_up() -> None:
        if mistake := mistakes[dist.get_rank()]:
            raise RuntimeError(mistake)
        dist.barrier()

    with pytest.raises(Exception) as raised:  # noqa: PT011  (what it is, the test looks at)
        agreement_of(None).run_together("setting up", set_up)
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize(
    ("mistakes", "expected"),
    [
        (("", "no engine"), ("FabricInitError: setting up failed on rank 1, .*no engine", "RuntimeError: no engine")),
        (("no engine", "no engine"), ("RuntimeError: no engine", "RuntimeError: no engine")),
    ],
    ids=["on one rank", "on both"],
)
def test_a_collective_to_which_a_rank_does_not_come_because_it_failed(
    mistakes: tuple[str, str], expected: tuple[str, str]
) -> None:
    for found, each in zip(run_ranks(2, end_in_a_collective, mistakes=mistakes), expected, strict=True):
        assert re.match(each, found, re.DOTALL), found
