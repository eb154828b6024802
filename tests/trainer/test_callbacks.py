"""Lightning's callbacks and tuner, which copy, freeze or restore models: as with a model that Lightning loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from fabric_init import FillModel, deferred_init, init_report
from fabric_init.errors import RecordingError
from tests.trainer.models import Early, LoadEagerly, Module, data, different, trainer, weights, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, of small data and of what callbacks need


class Finetuning(BaseFinetuning):
    """Trains the body of the network from the second epoch on."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net.body)  # type: ignore[union-attr, arg-type]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.body, optimizer)  # type: ignore[union-attr, arg-type]


class OnlyTrainable(Early):
    """Leaves frozen parameters out of its optimizer, and has what the tuner looks for."""

    lr, batch_size = 0.05, 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(48.0).view(12, 4) / 48, batch_size=self.batch_size)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def built(path: Path, ours: bool) -> tuple[OnlyTrainable, list[Callback]]:
    if ours:
        with deferred_init():
            return OnlyTrainable(), [FillModel(path, part="net")]
    module = OnlyTrainable()
    LoadEagerly(path)(module)
    return module, []


CALLBACKS: dict[str, Callable[[Path], Callback]] = {
    "averages": lambda _: WeightAveraging(),
    "moving averages": lambda _: EMAWeightAveraging(decay=0.5),
    "prunes": lambda _: ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False),
    "prunes to a lottery ticket": lambda _: ModelPruning("l1_unstructured", amount=0.5),
    "averages at the end": lambda _: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
    "fine-tuning": lambda _: Finetuning(),
    "checkpoints": lambda folder: ModelCheckpoint(folder, save_last=True),
    "checkpoints of failures": lambda folder: OnExceptionCheckpoint(folder),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_has_with_a_recorded_model_the_effect_that_it_has_with_a_loaded_one(
    name: str, last: bool, tmp_path: Path
) -> None:
    path, found = write(tmp_path)[0], []
    for ours in (True, False):
        module, callbacks = built(path, ours)
        callbacks.insert(0 if last else len(callbacks), CALLBACKS[name](tmp_path / str(ours)))
        torch.manual_seed(1)
        trainer(*callbacks, max_steps=-1, max_epochs=3, enable_checkpointing="checkpoints" in name).fit(module)
        found.append(weights(module))
    assert different(*found) == []


def find_rate(tuner: Tuner, module: Module) -> None:
    tuner.lr_find(module, num_training=4)


def find_batch_size(tuner: Tuner, module: Module) -> None:
    tuner.scale_batch_size(module, max_trials=1, steps_per_trial=1)


def find_batch_size_of_validation(tuner: Tuner, module: Module) -> None:
    tuner.scale_batch_size(module, method="validate", max_trials=1, steps_per_trial=1)


@pytest.mark.parametrize("find", [find_rate, find_batch_size, find_batch_size_of_validation])
def test_after_the_tuner_the_declared_weights_are_there_again(
    find: Callable[[Tuner, Module], None], tmp_path: Path
) -> None:
    path, found = write(tmp_path)[0], []
    for ours in (True, False):
        module, callbacks = built(path, ours)
        started = trainer(*callbacks, default_root_dir=tmp_path)
        torch.manual_seed(1)
        find(Tuner(started), module)
        restored = weights(module)
        started.fit(module)
        found.append({f"before {name}": value for name, value in restored.items()} | weights(module))
    assert different(*found) == []


def test_a_callback_that_calls_configure_model_itself_is_named_in_the_error(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    with pytest.raises(RecordingError, match="as WeightAveraging does"):
        trainer(FillModel(path, part="net"), EMAWeightAveraging()).fit(Module(), data())


class Shadow(Callback):
    """Keeps copies of weights, in a list and in an object."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        weight = pl_module.get_parameter("net.head.weight").detach()
        self.copies, self.doubled = [weight.clone()], weight * 2


def test_what_a_callback_keeps_is_no_part_of_the_model_that_is_filled(tmp_path: Path) -> None:
    path, _ = write(tmp_path)
    state = {f"net.{name}": value for name, value in torch.load(path).items()}
    torch.save(state, tmp_path / "whole.pt")
    shadow = Shadow()
    with deferred_init():
        module = Early()
    trainer(FillModel(tmp_path / "whole.pt"), shadow).fit(module, data())
    assert [row.name for row in init_report(module).rows if not row.name.startswith("net.")] == []
    assert torch.equal(shadow.copies[0], state["net.head.weight"])
    assert torch.equal(shadow.doubled, state["net.head.weight"] * 2)
