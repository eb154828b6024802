"""What callbacks compute from a recorded model in ``setup`` is what they compute from one that Lightning has loaded."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from fabric_init import FillModel, deferred_init
from fabric_init.errors import RecordingError, UninitializedTensorError
from tests.support.ranks import run_ranks_each
from tests.trainer.models import Early, LoadEagerly, Module, data, different, shard, trainer, weights, write
from tests.trainer.strategies import STRATEGIES

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, of small data and of what callbacks need


class Attention(nn.Module):
    """Has a square weight, and three that share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(4, 4))
        self.q, self.k, self.v = (nn.Parameter(part) for part in torch.randn(12, 4).chunk(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.square + x @ self.q * (x @ self.k) + x @ self.v


class Attends(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Attention()
        self.teacher: list[nn.Module] = []

    def setup(self, stage: str) -> None:
        self.teacher.append(copy.deepcopy(self.net))


class Keeps(Callback):
    """Copies the network and computes from its weights, before ``writes`` changes one of them."""

    def __init__(self, *, writes: bool = False) -> None:
        self.writes = writes
        self.copied = nn.Module()
        self.kept: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        net: Any = pl_module.net
        self.copied = copy.deepcopy(net)
        self.kept = {name: each.detach().clone() for name, each in net.named_parameters()}
        self.kept["turned"] = nn.Parameter(net.square.detach().t().clone())
        self.kept["rows"] = net.square.detach()[1:3].clone()
        self.kept["double"] = net.square.detach().double()
        self.kept["sum"] = (net.square @ net.k).detach() + net.v
        with torch.no_grad():
            self.copied.square[1].fill_(7.0)  # type: ignore[index]
            if self.writes:
                net.square[0].zero_()
        self.kept["later"] = net.square.detach().clone()

    def everything(self) -> dict[str, Tensor]:
        return self.kept | {f"copied.{name}": value for name, value in weights(self.copied).items()}


def attends(ours: bool) -> Attends:
    torch.manual_seed(4)
    with deferred_init(rng="eager") if ours else nullcontext():
        return Attends()


def of_all(module: Attends, keeps: Keeps) -> dict[str, Tensor]:
    (teacher,) = module.teacher
    return keeps.everything() | weights(module) | {f"teacher.{n}": value for n, value in weights(teacher).items()}


@pytest.mark.parametrize("writes", [False, True])
def test_copies_have_the_values_of_their_moment_by_the_models_own_init(writes: bool) -> None:
    found = []
    for ours in (True, False):
        module, keeps = attends(ours), Keeps(writes=writes)
        trainer(*([FillModel()] if ours else []), keeps).validate(module, data(), verbose=False)
        found.append(of_all(module, keeps))
    assert different(*found) == []


def test_copies_have_the_values_of_the_checkpoint_also_where_parameters_share_memory(tmp_path: Path) -> None:
    path, found = tmp_path / "net.pt", []
    torch.save({name: torch.randn(each.shape) for name, each in Attention().state_dict().items()}, path)
    for ours in (True, False):
        module, keeps = attends(ours), Keeps()
        if not ours:
            LoadEagerly(path)(module)
        trainer(*([FillModel(path, part="net")] if ours else []), keeps).validate(module, data(), verbose=False)
        found.append(of_all(module, keeps))
    assert different(*found) == []


def test_a_write_that_the_checkpoint_would_overwrite_is_refused(tmp_path: Path) -> None:
    torch.save(Attention().state_dict(), tmp_path / "net.pt")
    with pytest.raises(RecordingError, match=r"square: written after the recorded block"):
        trainer(FillModel(tmp_path / "net.pt", part="net"), Keeps(writes=True)).validate(attends(True), data())


def test_a_recorded_network_that_is_no_copy_goes_on_waiting() -> None:
    keeps = Keeps()
    with deferred_init():
        module, other = Attends(), Attention()
    keeps.other = other  # type: ignore[attr-defined]
    trainer(FillModel(), keeps).validate(module, data(), verbose=False)
    assert different(weights(keeps.copied), {}) == ["k", "q", "square", "v"]
    with pytest.raises(UninitializedTensorError, match="square"):
        other(torch.ones(4))


# -- with a checkpoint to resume from ----------------------------------------------------------------------------------


def test_a_resumed_model_leaves_copies_what_was_there_before(tmp_path: Path) -> None:
    for declared in (None, tmp_path / "net.pt"):
        saved, found = tmp_path / "saved.ckpt", []
        torch.save(
            {name: torch.randn(each.shape) for name, each in Attention().state_dict().items()}, tmp_path / "net.pt"
        )
        first, saving = attends(False), trainer()
        saving.fit(first, data())
        saving.save_checkpoint(saved)
        for ours in (True, False):
            module, keeps = attends(ours), Keeps()
            if declared and not ours:
                LoadEagerly(declared)(module)
            callbacks = [FillModel(declared, part="net" if declared else "")] if ours else []
            started = trainer(*callbacks, keeps)
            started.validate(module, data(), ckpt_path=saved, weights_only=False, verbose=False)
            assert different(weights(module), weights(first)) == []
            found.append(of_all(module, keeps))
        assert different(*found) == []


def test_moving_averages_go_on_where_they_were_saved(tmp_path: Path) -> None:
    whole, _ = write(tmp_path)
    saved, found = tmp_path / "saved.ckpt", []
    first, saving = Early(), trainer(EMAWeightAveraging(decay=0.5))
    saving.fit(first, data())
    saving.save_checkpoint(saved)
    for ours in (True, False):
        with deferred_init() if ours else nullcontext():
            module = Early()
        callbacks = [FillModel(whole, part="net")] if ours else []
        started = trainer(*callbacks, EMAWeightAveraging(decay=0.5), max_steps=5)
        started.fit(module, data(), ckpt_path=saved, weights_only=False)
        found.append(weights(module))
    assert different(*found) == []


# -- on ranks ----------------------------------------------------------------------------------------------------------


class Sharded(Early):
    """Shards in ``configure_model`` what its constructor has built."""

    def configure_model(self) -> None:
        if "ModelParallel" in type(self.trainer.strategy).__name__:
            shard(self)


class KeepsOnOne(Callback):
    """Copies the network, on the first rank alone if ``alone``."""

    def __init__(self, *, alone: bool) -> None:
        self.alone = alone
        self.copied: nn.Module | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero or not self.alone:
            self.copied = copy.deepcopy(pl_module.net)  # type: ignore[arg-type]


def copied(strategy: str, file: Path | None, alone: bool) -> dict[str, Tensor] | None:
    keeps = KeepsOnOne(alone=alone)
    torch.manual_seed(1)
    with deferred_init():
        module = Sharded()
    fill = FillModel() if file is None else FillModel(file, part="net")
    trainer(fill, keeps, strategy=STRATEGIES[strategy](), devices=2).fit(module, data())
    return None if keeps.copied is None else weights(keeps.copied)


def test_copies_are_whole_on_each_rank_however_the_model_is_kept(tmp_path: Path) -> None:
    whole, _ = write(tmp_path)
    cases: dict[Any, dict[str, Any]] = {
        (strategy, file, alone): {"strategy": strategy, "file": file, "alone": alone}
        for strategy in ("ddp", "model parallel", "deepspeed 3")
        for file, alone in ((whole, False), (None, False), (whole, True))
    }
    for (strategy, file, alone), ranks in run_ranks_each(2, copied, cases).items():
        expected = copied_by_one(file)
        for rank, found in enumerate(ranks):
            if alone and rank:
                assert found is None
            else:
                assert different(found or {}, expected) == [], (strategy, file)


def copied_by_one(file: Path | None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    with deferred_init():
        module = Early()
    fill = FillModel() if file is None else FillModel(file, part="net")
    trainer(fill).validate(module, data(), verbose=False)
    return weights(module.net)
