"""The harness itself: it must not hang, and a failing rank must be easy to understand."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RanksFailedError, run_ranks, try_ranks


def add_up(start: int) -> tuple[int, int]:
    dist.init_process_group("gloo")
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_form_a_group_and_return_in_order(world_size: int) -> None:
    total = sum(10 + rank for rank in range(world_size))
    assert run_ranks(world_size, add_up, start=10) == [(rank, total) for rank in range(world_size)]


def fail_on_rank_1() -> None:
    print("about to do something on rank", os.environ["RANK"])
    if os.environ["RANK"] == "1":
        raise LookupError("the reason")


def test_a_failing_rank_shows_its_traceback_and_output() -> None:
    with pytest.raises(RanksFailedError) as raised:
        run_ranks(2, fail_on_rank_1)
    message = str(raised.value)
    assert "1 of 2 ranks failed" in message
    assert "LookupError: the reason" in message
    assert "about to do something on rank 1" in message
    assert "on rank 0" not in message


def die_on_rank_1(pid_file: str) -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(60)


def test_a_hanging_rank_is_killed_with_its_children_and_says_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.ranks.GRACE_SECONDS", 1.0)
    run_ranks(1, add_up, start=0)  # starts the fork server if this is the first test to need it
    start = time.monotonic()
    hung, dead = try_ranks(2, die_on_rank_1, pid_file=str(tmp_path / "pid"))
    assert time.monotonic() - start < 10
    assert dead.error == "no result: exit status 7"
    assert hung.error == "no result: killed by SIGKILL"
    assert "in die_on_rank_1" in hung.output
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child of a killed rank goes on"
        time.sleep(0.05)
