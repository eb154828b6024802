"""``io="broadcast"`` when something goes wrong on one rank: an error on every rank within seconds, and no hang."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from safetensors.torch import load_file, save_file

from fabric_init import CheckpointMismatchError, FabricInitError, RanksDisagreeError, RanksLostError
from fabric_init.distributed import broadcast
from fabric_init.distributed import who_reads as distributed_io
from tests.support.ranks import Outcome, run_ranks, try_ranks
from tests.support.watched import watched
from tests.support.zoo import STRATEGIES, build, launch, write_checkpoint

FILE = "model.safetensors"
SECONDS = 15.0
in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def fail(
    strategy: str, path: Path, budget: int = 200, io: Sequence[Any] = (), **options: Any
) -> tuple[str, str, float]:
    """The error of a load that cannot succeed: class, message, and how long it took to come."""
    rank = int(os.environ["RANK"])
    distributed_io.BUDGET = budget
    fabric = launch(strategy, io=io[rank] if io else "broadcast")
    start = time.monotonic()
    with pytest.raises(FabricInitError) as raised:
        fabric.setup(build(fabric, "uneven", checkpoint=path))
    return raised.type.__name__, str(raised.value), time.monotonic() - start


def fail_in_own_folder(strategy: str, folders: list[Path]) -> tuple[str, str, float]:
    os.chdir(folders[int(os.environ["RANK"])])
    return fail(strategy, Path(FILE))


@in_every_strategy
def test_a_file_that_rank_0_does_not_have(strategy: str, tmp_path: Path) -> None:
    folders = [tmp_path / "machine 0", tmp_path / "machine 1"]
    for folder in folders:
        folder.mkdir()
    write_checkpoint(folders[1] / FILE, "uneven")
    first, second = run_ranks(2, fail_in_own_folder, strategy=strategy, folders=folders)
    assert first[0] == "CheckpointNotFoundError"
    assert "rank 0" in second[1]
    assert FILE in second[1]
    assert max(first[2], second[2]) < SECONDS


def test_ranks_that_were_told_to_read_in_different_ways(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    for kind, message, seconds in run_ranks(2, fail, strategy="ddp", path=path, io=["broadcast", "local"]):
        assert kind == RanksDisagreeError.__name__
        assert "init_module is not the same on every rank" in message
        assert "io='broadcast'" in message
        assert seconds < SECONDS


def truncate_in_the_middle(strategy: str, path: Path) -> tuple[str, str, float]:
    watched(lambda count: os.truncate(path, path.stat().st_size // 2) if count == 3 else None)
    return fail(strategy, path)


@in_every_strategy
def test_a_file_that_is_cut_off_while_it_is_read(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    found = run_ranks(4, truncate_in_the_middle, strategy=strategy, path=path)
    assert found[0][0] == "CheckpointFormatError"
    for kind, message, seconds in found[1:]:
        assert kind == "FabricInitError"
        assert f"failed on rank 0, so all ranks stop. Rank 0: CheckpointFormatError: {path} changed" in message
        assert seconds < SECONDS


def differ_in_a_tie(path: Path) -> tuple[str, str]:
    fabric = launch("fsdp2", io="broadcast")
    with pytest.raises(FabricInitError) as raised:
        fabric.setup(build(fabric, "transformerish", checkpoint=path))
    return raised.type.__name__, str(raised.value)


def test_tied_tensors_that_differ_in_the_file(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "transformerish")
    state = load_file(path)
    state["lm_head.weight"][-1, -1] += 1
    save_file(state, path)
    first, second = run_ranks(2, differ_in_a_tie, path=path)
    assert first[0] == CheckpointMismatchError.__name__
    for message in (first[1], second[1]):
        assert "embed_tokens.weight and lm_head.weight hold different values" in message or (
            "lm_head.weight and embed_tokens.weight hold different values" in message
        )


def _at_the_third_part(act: Callable[[], None], rank: int) -> None:
    """Let ``rank`` do this, when it is about to keep the third part of what it is sent."""
    if int(os.environ["RANK"]) != rank:
        return
    copy, parts = broadcast.copy_part, itertools.count()

    def copy_or_act(*args: Any) -> None:
        if next(parts) == 3:
            act()
        copy(*args)

    broadcast.copy_part = copy_or_act


def _out_of_memory() -> None:
    raise MemoryError("no room for more")


def fail_to_keep(strategy: str, path: Path, rank: int) -> tuple[str, str, float]:
    _at_the_third_part(_out_of_memory, rank)
    return fail(strategy, path)


@pytest.mark.parametrize("rank", [0, 2])
@in_every_strategy
def test_a_rank_that_fails_in_the_middle_for_a_reason_of_its_own(strategy: str, rank: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    found = run_ranks(4, fail_to_keep, strategy=strategy, path=path, rank=rank)
    assert found[rank][0] == "OutOfMemoryError"
    assert "no room for more" in found[rank][1]
    for other in set(range(4)) - {rank}:
        kind, message, seconds = found[other]
        assert kind == "FabricInitError"
        assert f"failed on rank {rank}, so all ranks stop. Rank {rank}: MemoryError: no room for more" in message
        assert seconds < SECONDS


def fail_before_the_first_read(strategy: str, path: Path) -> tuple[str, str, float]:
    def cannot(*args: Any) -> NoReturn:
        _out_of_memory()

    if int(os.environ["RANK"]) == 1:
        broadcast.loads = cannot
    return fail(strategy, path)


@in_every_strategy
def test_a_rank_that_fails_before_anything_is_read(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    found = run_ranks(3, fail_before_the_first_read, strategy=strategy, path=path)
    assert [kind for kind, *_ in found] == ["FabricInitError", "OutOfMemoryError", "FabricInitError"]
    assert max(seconds for *_, seconds in found) < SECONDS


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_keeping(strategy: str, path: Path, rank: int) -> tuple[str, str, float]:
    _at_the_third_part(_die, rank)
    return fail(strategy, path)


def die_while_reading(strategy: str, path: Path) -> tuple[str, str, float]:
    watched(lambda count: _die() if count == 3 else None)
    return fail(strategy, path)


@pytest.mark.parametrize("rank", [0, 1, 3])
@in_every_strategy
def test_a_rank_that_is_killed_while_it_keeps_what_it_is_sent(strategy: str, rank: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    _all_others_name(rank, try_ranks(4, die_while_keeping, strategy=strategy, path=path, rank=rank))


def test_rank_0_is_killed_while_it_reads(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / FILE, "uneven")
    _all_others_name(0, try_ranks(4, die_while_reading, strategy="ddp", path=path))


def _all_others_name(rank: int, outcomes: list[Outcome]) -> None:
    assert outcomes[rank].error == "no result: killed by SIGKILL"
    for outcome in outcomes:
        if outcome.rank != rank:
            assert not outcome.error, outcome.error + outcome.output
            kind, message, seconds = outcome.value
            assert kind == RanksLostError.__name__
            assert f"rank {rank} is gone, so all ranks stop" in message
            assert seconds < SECONDS
