"""``io="broadcast"``: rank 0 reads each tensor once for all, and ranks hold what they would have read themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fabric_init.checkpoints import Box, Region, Span, open_checkpoint
from fabric_init.distributed import who_reads as io
from fabric_init.distributed.agreement import RankGroup
from fabric_init.distributed.broadcast import BroadcastReader
from fabric_init.distributed.who_reads import open_on_all_ranks
from fabric_init.planning.checkpoint_source import CheckpointSource
from tests.support.ranks import run_ranks, run_ranks_each
from tests.support.watched import watched
from tests.support.zoo import (
    IN_FOURS,
    IN_PAIRS,
    NAMES,
    STRATEGIES,
    assert_same,
    build,
    launch,
    one_device,
    ties,
    weights,
    write_checkpoint,
)

FILE = "model.safetensors"
in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def load(strategy: str, name: str, budget: int, precision: str = "32-true", **options: Any) -> dict[str, Any]:
    io.BUDGET = budget
    fabric = launch(strategy, precision, io="broadcast")
    model = fabric.setup(build(fabric, name, **options))
    statuses = {row.name: row.status for row in fabric.init_report(model).rows}
    return {"weights": weights(model), "ties": ties(model), "statuses": statuses}


def check(found: Sequence[dict[str, Any]], expected: nn.Module) -> None:
    for rank in found:
        assert_same(rank["weights"], weights(expected))
        assert rank["ties"] == ties(expected)


@pytest.mark.sweep(*IN_PAIRS, *IN_FOURS)
@pytest.mark.parametrize("world_size", [2, 4])
@in_every_strategy
def test_every_rank_holds_what_is_in_the_file(strategy: str, world_size: int, tmp_path: Path) -> None:
    cases = {name: {"name": name, "checkpoint": write_checkpoint(tmp_path / f"{name}.pt", name)} for name in NAMES}
    found = run_ranks_each(world_size, load, cases, strategy=strategy, budget=1 << 20)
    for name, case in cases.items():
        check(found[name], one_device(name, checkpoint=case["checkpoint"]))


@in_every_strategy
def test_a_budget_smaller_than_one_tensor_will_do(strategy: str, tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / file, "uneven") for file in (FILE, "model.pt")]
    cases = {(path.name, budget): {"checkpoint": path, "budget": budget} for path in paths for budget in (64, 1000)}
    found = run_ranks_each(4, load, cases, strategy=strategy, name="uneven")
    for case, arguments in cases.items():
        check(found[case], one_device("uneven", checkpoint=arguments["checkpoint"]))


@in_every_strategy
@pytest.mark.parametrize(
    ("saved", "precision", "kept"),
    [(torch.bfloat16, "32-true", torch.float32), (torch.float32, "bf16-true", torch.bfloat16)],
    ids=["bf16 into fp32", "fp32 into bf16"],
)
def test_what_the_file_lacks_is_initialized_and_dtypes_are_the_models(
    saved: torch.dtype, precision: str, kept: torch.dtype, strategy: str, tmp_path: Path
) -> None:
    cases: dict[str, dict[str, Any]] = {}
    for name in ("uneven", "buffers"):
        path = write_checkpoint(tmp_path / f"{name}.safetensors", name, dtype=saved, partial=True)
        cases[name] = {"name": name, "checkpoint": path, "strict": False}
    found = run_ranks_each(2, load, cases, strategy=strategy, budget=500, precision=precision)
    for name, case in cases.items():
        check(found[name], one_device(dtype=kept, **case))
        assert {"loaded", "initialized"} <= set(found[name][1]["statuses"].values())


# -- who reads what ----------------------------------------------------------------------------------------------------


def what_is_read(strategy: str, name: str, path: Path) -> list[tuple[str, Region | None]]:
    opened = watched()
    load(strategy, name, 500, checkpoint=path)
    return [part for reader in opened for part in reader.parts]


@pytest.mark.parametrize("name", ["uneven", "transformerish"])
@in_every_strategy
def test_rank_0_reads_each_element_once_and_the_others_open_nothing(strategy: str, name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, name)
    parts, *others = run_ranks(3, what_is_read, strategy=strategy, name=name, path=path)
    assert others == [[], []]
    state = load_file(path)
    for key, value in state.items():
        elements: list[int] = []
        for other, region in parts:
            if other == key:
                assert isinstance(region, Span)
                elements += range(region.start, region.stop)
        assert elements == list(range(value.numel())), key
    if name == "transformerish":
        assert {"embed_tokens.weight", "lm_head.weight"} <= state.keys(), "a tie saved under both of its names"


def memory_taken(strategy: str, path: Path) -> float:
    """The most that filling took at any time, in MiB."""
    io.BUDGET = 4 << 20
    fabric = launch(strategy, io="broadcast")
    with fabric.init_module(checkpoint=path):
        model = nn.Sequential(*(nn.Linear(1024, 4096, bias=False) for _ in range(4)))
        resident = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    model = fabric.setup(model)
    return (_resident("VmHWM") - resident) / 1024


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="memory peaks are Linux's")
@pytest.mark.parametrize(("strategy", "kept"), [("ddp", 64), ("fsdp2", 16)])
def test_a_rank_takes_its_regions_and_the_budget(strategy: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / FILE
    save_file({f"{index}.weight": torch.zeros(4096, 1024) for index in range(4)}, path)
    for taken in run_ranks(4, memory_taken, strategy=strategy, path=path):
        assert kept - 1 < taken < kept + 4 + 20, "code that runs for the first time and connections take some, too"


def read_regions(path: Path) -> list[Tensor]:
    launch("ddp")
    rank = torch.distributed.get_rank()
    reader = BroadcastReader.open(lambda: open_checkpoint(path), RankGroup(), 64)
    regions = [None, Box((rank, 0, 2), (1, 7, 3)), Span(rank * 10, rank * 10 + 25), Box((0, 0, 0), (0, 7, 7))]
    assert reader.spec("mix") == open_checkpoint(path).spec("mix")
    return [reader.read("mix", region) for region in regions]


def test_each_rank_may_ask_for_another_region(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    mix = load_file(path)["mix"]
    for rank, (all_of_it, box, span, nothing) in enumerate(run_ranks(3, read_regions, path=path)):
        assert torch.equal(all_of_it, mix)
        assert torch.equal(box, mix[rank : rank + 1, :, 2:5])
        assert torch.equal(span, mix.flatten()[rank * 10 : rank * 10 + 25])
        assert nothing.shape == (0, 7, 7)


def read_where_rank_0_has_the_file(strategy: str, folders: list[Path]) -> dict[str, Any]:
    os.chdir(folders[int(os.environ["RANK"])])
    return load(strategy, "uneven", 1000, checkpoint=FILE)


def _folders(folder: Path, count: int) -> list[Path]:
    folders = [folder / f"machine {rank}" for rank in range(count)]
    for each in folders:
        each.mkdir()
    return folders


@in_every_strategy
def test_only_rank_0_needs_the_file_and_that_of_others_does_not_matter(strategy: str, tmp_path: Path) -> None:
    folders = _folders(tmp_path, 3)
    path = write_checkpoint(folders[0] / FILE, "uneven")
    write_checkpoint(folders[2] / FILE, "buffers")
    found = run_ranks(3, read_where_rank_0_has_the_file, strategy=strategy, folders=folders)
    check(found, one_device("uneven", checkpoint=path))


def how_it_is_opened(path: Path) -> list[str]:
    launch("ddp")
    network = torch.distributed.get_rank() == 0
    io.file_system_of = lambda path: "nfs4" if network else "ext4"
    agreement = RankGroup()
    return [
        type(open_on_all_ranks(CheckpointSource(path), "auto", whole=whole, machines=2, agreement=agreement)).__name__
        for whole in (True, False)
    ]


def test_rank_0_decides_for_all_how_to_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    assert run_ranks(2, how_it_is_opened, path=path) == [["BroadcastReader", "SafetensorsReader"]] * 2
