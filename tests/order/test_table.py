"""Whatever is called, in whatever order: the weights are right, or the call is refused by name."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sequences import Files, run_table, write_files

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from ranks import run_ranks
from zoo import launch

from fabric_init import Fabric


def in_ranks(strategy: str, files: Files) -> dict[str, tuple[str, str]]:
    return run_table(launch(strategy), files)


def check(table: dict[str, tuple[str, str]]) -> None:
    wrong = [f"{cell}: {why}" for cell, (verdict, why) in table.items() if verdict == "WRONG"]
    assert not wrong, f"{len(wrong)} of {len(table)} cells\n" + "\n".join(wrong[:20])


def test_on_one_device(tmp_path: Path) -> None:
    table = run_table(Fabric(accelerator="cpu", devices=1), write_files(tmp_path))
    check(table)
    print(Counter(verdict for verdict, _ in table.values()), {why for v, why in table.values() if v == "refused"})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_on_two_ranks(strategy: str, tmp_path: Path) -> None:
    files = write_files(tmp_path)
    for table in run_ranks(2, in_ranks, strategy=strategy, files=files, seconds=300):
        check(table)
        print(Counter(verdict for verdict, _ in table.values()), {why for v, why in table.values() if v == "refused"})
