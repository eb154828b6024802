"""Adapters, resized embeddings, new heads, copies, casts: the model comes out right, or the change is refused.

One device takes every cell of the table. Without ``--whole`` each strategy takes a part, and all of them together all.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from lightning.fabric.plugins import BitsandbytesPrecision, Precision, TransformerEnginePrecision

from fabric_init import Fabric, FabricInitError
from tests.call_orders.changes import cells, run_cell, run_table, write
from tests.call_orders.trainings import orders
from tests.support.ranks import run_ranks
from tests.support.zoo import launch

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own advice

NEVER = {"lora, in the block, no rename", "lora, in the block, strict", "resized in the block, mean=False"}
NEVER |= {"dora, in the block, no rename", "dora, in the block, strict", "resized in the block, mean=True"}
NEVER |= {"pissa, in the block, reinit"}
"""Where file and model do not fit; the error says so."""
WITHOUT_MEMORY = {
    *(f"dora, {where}" for where in ("after the block", "eager block", "empty, loaded after setup")),
    *("resized after, mean=False", "resized after, mean=True"),
    *("pickle", "share_memory", "written in second block"),
}
"""What a strategy refuses that fills in ``setup``: until then the model has no values."""
AFTER_SETUP = {
    " → ".join(order)
    for order in orders()
    for setup, load in combinations(order, 2)
    if "setup" in setup and load in ("load", "assign")
}
"""FSDP's flat parameters: torch's own error."""
REFUSED = {
    "one": NEVER | {"to meta"},
    "ddp": NEVER | {"to meta"},
    "fsdp2": NEVER | WITHOUT_MEMORY,
    "deepspeed_stage_3": NEVER | WITHOUT_MEMORY,
    "fsdp": NEVER | WITHOUT_MEMORY | {"lora, empty, loaded after setup", *AFTER_SETUP},
}


STRATEGIES = ["ddp", "fsdp", "fsdp2", "deepspeed_stage_3"]
IN_EACH_PRECISION = ["lora, second block", "dora, second block", "dora, in the block, reinit", "tie_weights"]


def in_precision(precision: str, strategy: str, file: Path) -> dict[str, tuple[str, str]]:
    fabric = (
        launch(strategy, precision=precision) if strategy else Fabric(accelerator="cpu", devices=1, precision=precision)
    )
    return {cell.name: run_cell(fabric, cell, file, 3) for cell in cells() if cell.name in IN_EACH_PRECISION}


def in_ranks(strategy: str, file: Path, every: int) -> dict[str, tuple[str, str]]:
    # DeepSpeed takes its optimizer in setup: there the weights alone are looked at
    steps, first = 0 if "deepspeed" in strategy else 3, STRATEGIES.index(strategy) % every
    return run_table(launch(strategy), file, steps, every=every, first=first)


def check(table: dict[str, tuple[str, str]], refused: set[str]) -> None:
    wrong = [f"{cell}: {why}" for cell, (verdict, why) in table.items() if verdict == "WRONG"]
    assert not wrong, f"{len(wrong)} of {len(table)} cells\n" + "\n".join(wrong[:20])
    found = {cell for cell, (verdict, _) in table.items() if verdict == "refused"}
    wanted = refused & table.keys()
    assert found == wanted, {cell: table[cell][1][:300] for cell in found ^ wanted}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "other.pt", seed=78)
    return write(tmp_path / "llama.pt")


def test_on_one_device(file: Path) -> None:
    check(run_table(Fabric(accelerator="cpu", devices=1), file), REFUSED["one"])


@pytest.mark.sweep
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_two_ranks(strategy: str, whole: bool, file: Path) -> None:
    every = 1 if whole else len(STRATEGIES)
    for table in run_ranks(2, in_ranks, strategy=strategy, file=file, every=every, seconds=200):
        check(table, REFUSED[strategy])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
def test_adapters_in_each_precision(precision: str, file: Path) -> None:
    check(in_precision(precision, "", file), set())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_adapters_in_each_precision_on_two_ranks(precision: str, file: Path) -> None:
    for table in run_ranks(2, in_precision, precision=precision, strategy="fsdp2", file=file, seconds=100):
        check(table, set())


@pytest.mark.parametrize("plugin", [BitsandbytesPrecision, TransformerEnginePrecision])
def test_precision_with_layers_of_its_own_is_refused_in_a_recorded_block(plugin: type[Precision], file: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.strategy.precision = plugin.__new__(plugin)  # its constructor wants a package that needs a GPU
    with pytest.raises(FabricInitError, match=f"{plugin.__name__} puts layers of its own"):
        fabric.init_module(checkpoint=file).__enter__()
