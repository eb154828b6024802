"""Two ranks, every strategy of the Trainer: weights as on one device, steps as after Lightning's own way to start."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.fsdp.wrap import wrap

from fabric_init import FillModel, deferred_init
from fabric_init.errors import FabricInitError, UninitializedTensorError
from tests.support.ranks import run_ranks, run_ranks_each
from tests.trainer.models import Early, LoadEagerly, Module, Start, data, different, shard, trainer, weights, write
from tests.trainer.strategies import STRATEGIES


class Case(NamedTuple):
    """What is declared, for files in ``folder``."""

    file: str | None
    strict: bool = True

    def callback(self, folder: Path) -> FillModel:
        if self.file is None:
            return FillModel()
        return FillModel(folder / self.file, part="net", strict=self.strict)


CASES = {"a checkpoint": Case("whole.pt"), "one without head": Case("body.pt", strict=False), "scratch": Case(None)}


def recorded(strategy: str) -> Module:
    return Module(shard) if "parallel" in strategy else Module()


def on_rank(strategy: str, folder: Path, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The weights at the start, after three steps, and after three steps from Lightning's own start."""
    torch.manual_seed(1)
    ours, start = recorded(strategy), Start()
    trainer(case.callback(folder), start, strategy=STRATEGIES[strategy](), devices=2).fit(ours, data())
    if case.file != "whole.pt":  # what is not loaded is drawn otherwise there
        return start.weights, {}, {}
    theirs = Module(LoadEagerly(folder / case.file), *([shard] if "parallel" in strategy else []))
    trainer(strategy=STRATEGIES[strategy](), devices=2).fit(theirs, data())
    return start.weights, weights(ours), weights(theirs)


@pytest.mark.parametrize("strategy", ["ddp", "model parallel", "fsdp", "deepspeed 1", "deepspeed 2"])
def test_ranks_start_as_one_device_does_and_train_as_lightning_does(strategy: str, tmp_path: Path) -> None:
    write(tmp_path)
    found = run_ranks_each(
        2, on_rank, {name: {"case": case} for name, case in CASES.items()}, strategy=strategy, folder=tmp_path
    )
    for name, case in CASES.items():
        torch.manual_seed(1)
        expected = Module()
        trainer(case.callback(tmp_path)).validate(expected, data(), verbose=False)
        for start, ours, theirs in found[name]:
            assert different(start, weights(expected)) == []
            assert different(ours, theirs) == []


def resumed(strategy: str, folder: Path) -> list[list[str]]:
    """Train three steps and save; then resume from that."""
    first = recorded(strategy)
    saving = trainer(FillModel(folder / "whole.pt", part="net"), strategy=STRATEGIES[strategy](), devices=2)
    saving.fit(first, data())
    path = saving.strategy.broadcast(folder / "saved.ckpt")
    saving.save_checkpoint(path)
    second, third = recorded(strategy), recorded(strategy)
    options: dict[str, Any] = {"devices": 2, "max_steps": 3}
    for module, fill in (second, FillModel()), (third, FillModel(folder / "whole.pt", part="net")):
        again = trainer(fill, strategy=STRATEGIES[strategy](), **options)
        again.validate(module, data(), ckpt_path=path, weights_only=False, verbose=False)
    return [different(weights(first), weights(module)) for module in (second, third)]


@pytest.mark.parametrize("strategy", ["ddp", "model parallel", "model parallel, one file"])
def test_a_checkpoint_to_resume_from_has_the_last_word(strategy: str, tmp_path: Path) -> None:
    write(tmp_path)
    assert run_ranks(2, resumed, strategy=strategy, folder=tmp_path) == [[[], []]] * 2


class Sharded(Early):
    """Shards in ``configure_model`` what its constructor has built."""

    def configure_model(self) -> None:
        shard(self)


def sharded_later(folder: Path) -> dict[str, Tensor]:
    started = trainer(strategy=STRATEGIES["model parallel"](), devices=2)
    FillModel(folder / "whole.pt", part="net").attach(started)
    with started.init_module(empty_init=True):
        module = Sharded()
    started.validate(module, data(), verbose=False)
    return weights(module)


def test_what_init_module_has_recorded_may_be_sharded_in_configure_model(tmp_path: Path) -> None:
    whole, _ = write(tmp_path)
    expected = Module(LoadEagerly(whole))
    expected.configure_model()
    for found in run_ranks(2, sharded_later, folder=tmp_path):
        assert different(found, weights(expected)) == []


def unfilled(strategy: str, stage: str) -> None:
    module = Module(*([shard] if "parallel" in strategy else []), block=deferred_init)
    with pytest.raises(UninitializedTensorError, match=r"body\.0\.weight"):
        getattr(trainer(strategy=STRATEGIES[strategy](), devices=2), stage)(module, data())


GUARDED = ("ddp", "model parallel", "fsdp")


def test_no_strategy_runs_a_model_that_nobody_has_filled() -> None:
    cases = {(s, stage): {"strategy": s, "stage": stage} for s in GUARDED for stage in ("fit", "predict")}
    run_ranks_each(2, unfilled, cases)


def wrap_body(module: Module) -> None:
    module.net.body = wrap(module.net.body, device_id=torch.device("cpu"))


def wrapped(folder: Path) -> None:
    fill = FillModel(folder / "whole.pt", part="net")
    with pytest.raises(FabricInitError, match=r"net\.body was wrapped by FSDP before it had values"):
        trainer(fill, strategy=STRATEGIES["fsdp"](), devices=2).validate(Module(wrap_body), data())


def test_what_fsdp_has_wrapped_in_configure_model_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    run_ranks(2, wrapped, folder=tmp_path)


def from_scratch(strategy: str) -> dict[str, Tensor]:
    torch.manual_seed(int(os.environ["RANK"]))
    start = Start()
    trainer(FillModel(), start, strategy=STRATEGIES[strategy](), devices=2).fit(recorded(strategy), data())
    return start.weights


def test_ranks_of_different_seeds_draw_what_the_first_of_them_draws() -> None:
    torch.manual_seed(0)
    expected = Module()
    trainer(FillModel()).validate(expected, data(), verbose=False)
    for ranks in run_ranks_each(2, from_scratch, {s: {"strategy": s} for s in GUARDED}).values():
        for found in ranks:
            assert different(found, weights(expected)) == []


class DrawsByRank(Early):
    """Has another shape on the second rank."""

    def configure_model(self) -> None:
        if self.global_rank == 1:
            self.net.head = torch.nn.Linear(6, 4)


def disagreeing(folder: Path) -> str:
    with deferred_init():
        module = DrawsByRank()
    fill = FillModel(folder / "whole.pt", part="net")
    with pytest.raises(Exception) as raised:  # noqa: PT011  (each rank says it in its way)
        trainer(fill, strategy="ddp", devices=2).validate(module, data(), verbose=False)
    return str(raised.value)


def test_all_ranks_raise_where_one_has_a_model_of_its_own(tmp_path: Path) -> None:
    write(tmp_path)
    assert all("head.weight" in text for text in run_ranks(2, disagreeing, folder=tmp_path))


class StartOfPartitions(Callback):
    """Remembers the weights with which training starts, and those after it, gathered from ZeRO-3's partitions."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self._gathered(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end = self._gathered(pl_module)

    def _gathered(self, module: LightningModule) -> dict[str, Tensor]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            return weights(module)


class WithMore(Early):
    """Has layers that no checkpoint is for."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(3, 3)

    def loss(self, batch: Tensor) -> Tensor:
        return self.more(self.net(batch)).pow(2).mean()


def partitioned(strategy: str, folder: Path, case: Case, early: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(1)
    seen = StartOfPartitions()
    with deferred_init() if early else nullcontext():
        module = WithMore() if early else Module()
    trainer(case.callback(folder), seen, strategy=STRATEGIES[strategy](), devices=2).fit(module, data())
    return seen.start, seen.end


def test_partitions_of_zero_3_start_as_one_device_does_and_train(tmp_path: Path) -> None:
    write(tmp_path)
    cases: dict[Any, dict[str, Any]] = {
        (strategy, name, early): {"strategy": strategy, "case": case, "early": early}
        for strategy in ("deepspeed 3", "deepspeed 3 with offload")
        for name, case in CASES.items()
        for early in ((False, True) if strategy == "deepspeed 3" else (False,))
    }
    for (_, name, early), ranks in run_ranks_each(2, partitioned, cases, folder=tmp_path).items():
        torch.manual_seed(1)
        with deferred_init() if early else nullcontext():
            expected = WithMore() if early else Module()
        trainer(CASES[name].callback(tmp_path)).validate(expected, data(), verbose=False)
        for start, end in ranks:
            assert different(start, weights(expected)) == []
            assert different(end, ranks[0][1]) == []
            assert different(end, start) != []
