"""Whatever is called, in whatever order: the weights are right, or the call is refused by name.

One device takes every cell of the table. Without ``--whole`` each strategy takes a part, and all of them together all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fabric_init import Fabric
from tests.call_orders.sequences import Files, cells, run_table, write_files
from tests.support.ranks import run_ranks
from tests.support.zoo import launch

REFUSED = {
    "ddp": (),
    "fsdp": (
        # Lightning hands load_state_dict to the model under FSDP's wrapper, whose parameters are flat
        "load_state_dict: RuntimeError: Error(s) in loading state_dict",
        "assign: RuntimeError: Error(s) in loading state_dict",
        "load: ValueError: Could not find a FSDP model",  # Lightning's, before setup
    ),
    "fsdp2": ("load: ValueError: Could not find a distributed model",),  # Lightning's, before setup
    "deepspeed_stage_2": (),
    "deepspeed_stage_3": ("assign: FabricInitError: embed_tokens.weight is partitioned by DeepSpeed",),
}
"""What may be refused, and how it is said."""


def in_ranks(strategy: str, files: Files, every: int) -> dict[str, tuple[str, str]]:
    first = list(REFUSED).index(strategy) % every
    return run_table(launch(strategy), files, every=every, first=first, waits=strategy != "fsdp")


def check(table: dict[str, tuple[str, str]], refused: tuple[str, ...]) -> None:
    wrong = [
        f"{cell}: {why}"
        for cell, (verdict, why) in table.items()
        if verdict != "right" and not (verdict == "refused" and why.startswith(refused or ("nothing",)))
    ]
    assert not wrong, f"{len(wrong)} of {len(table)} cells\n" + "\n".join(wrong[:20])


def test_the_table_is_large() -> None:
    assert len(list(cells())) > 200


def test_on_one_device(tmp_path: Path) -> None:
    check(run_table(Fabric(accelerator="cpu", devices=1), write_files(tmp_path)), ())


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", REFUSED)
def test_on_two_ranks(strategy: str, whole: bool, tmp_path: Path) -> None:
    files, every = write_files(tmp_path), 1 if whole else len(REFUSED)
    for table in run_ranks(2, in_ranks, strategy=strategy, files=files, every=every, seconds=300):
        check(table, REFUSED[strategy])
