"""``FillModel`` in Lightning's Trainer on one device: where values come from, in each stage, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from torch import Tensor

from fabric_init import FillModel, deferred_init, init_report, materialize
from fabric_init.errors import (
    CheckpointMismatchError,
    FabricInitError,
    OptionError,
    RecordingError,
    UninitializedTensorError,
)
from fabric_init.guard.waiting_tensors import unfilled
from tests.trainer.models import Early, LoadEagerly, Module, Net, Start, data, different, trainer, weights, write

STAGES = ("fit", "validate", "test", "predict")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path)[0]


def eager(path: Path) -> dict[str, Tensor]:
    module = Module(LoadEagerly(path))
    module.configure_model()
    return weights(module)


def in_deferred_init(_: Any) -> Module:
    with deferred_init():
        return Early()


def in_init_module(started: Any) -> Module:
    with started.init_module(empty_init=True):
        return Early()


def in_configure_model(_: Any) -> Module:
    return Module()


BUILT = (in_configure_model, in_deferred_init, in_init_module)


@pytest.mark.parametrize("build", BUILT)
def test_three_steps_are_those_of_a_model_that_lightning_loads(whole: Path, build: Callable[[Any], Module]) -> None:
    started, start = trainer(), Start()
    FillModel(whole, part="net").attach(started).callbacks.append(start)
    ours, theirs = build(started), Module(LoadEagerly(whole))
    started.fit(ours, data())
    trainer().fit(theirs, data())
    assert different(start.weights, eager(whole)) == []
    assert different(weights(ours), weights(theirs)) == []


@pytest.mark.parametrize("build", BUILT)
def test_without_a_checkpoint_a_model_gets_its_own_init(build: Callable[[Any], Module]) -> None:
    started = FillModel().attach(trainer())
    torch.manual_seed(3)
    module = build(started)
    started.validate(module, data(), verbose=False)
    torch.manual_seed(3)
    with deferred_init():
        expected = Net()
    materialize(expected)
    assert different(weights(module.net), weights(expected)) == []


def test_what_a_checkpoint_lacks_gets_the_models_own_init(tmp_path: Path) -> None:
    whole, body = write(tmp_path)
    module = Module()
    trainer(FillModel(body, part="net", strict=False)).validate(module, data(), verbose=False)
    assert set(different(weights(module), eager(whole))) == {"net.head.weight", "net.head.bias"}
    statuses = {row.name: row.status for row in init_report(module.net).rows}
    assert (statuses["head.weight"], statuses["body.0.weight"]) == ("initialized", "loaded")
    assert 0.01 < float(module.net.head.weight.detach().std()) < 0.03


def test_a_strict_load_of_too_little_is_an_error_before_training(tmp_path: Path) -> None:
    _, body = write(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"head\.weight"):
        trainer(FillModel(body, part="net")).fit(Module(), data())


class WithTask(Module):
    """Has a part that is not of the checkpoint, and one that was built with values."""

    def __init__(self) -> None:
        super().__init__()
        self.eager = torch.nn.Linear(3, 3)

    def configure_model(self) -> None:
        super().configure_model()
        self.task = torch.nn.Linear(3, 3)


def test_what_is_beside_the_part_gets_its_own_init_or_keeps_its_values(whole: Path) -> None:
    module = WithTask()
    before = weights(module)
    trainer(FillModel(whole, part="net")).validate(module, data(), verbose=False)
    after = weights(module)
    assert different(after, eager(whole) | before | {k: v for k, v in after.items() if "task" in k}) == []
    assert 0 < float(module.task.weight.detach().abs().max()) <= 3**-0.5


class WithTeacher(Module):
    """Keeps a copy of the network, as for moving averages of its weights, and one that is not saved."""

    def configure_model(self) -> None:
        super().configure_model()
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.teacher = [copy.deepcopy(self.net)]


@pytest.mark.parametrize("part", ["net", ""])
def test_copies_of_the_part_have_what_was_declared_for_it(whole: Path, part: str) -> None:
    module = WithTeacher()
    rename: Any = None if part else {"^": "net."}
    trainer(FillModel(whole, part=part, strict=bool(part), rename=rename)).validate(module, data(), verbose=False)
    expected = weights(module.net)
    assert different({f"net.{name}": value for name, value in expected.items()}, eager(whole)) == []
    assert different(weights(module.average), expected) == []
    assert different(weights(module.teacher[0]), expected) == []


def test_a_model_that_is_there_already_leaves_torchs_generator_where_lightning_leaves_it(whole: Path) -> None:
    orders = []
    for callbacks in ([FillModel(whole, part="net")], []):
        module = Module() if callbacks else Module(LoadEagerly(whole))
        trainer(*callbacks).validate(module, data(), verbose=False)
        torch.manual_seed(3)
        trainer(*callbacks).validate(module, data(), verbose=False)
        orders.append(torch.get_rng_state())
    assert torch.equal(*orders)


def test_a_model_is_filled_once_and_trained_values_stay(whole: Path) -> None:
    module, started = Module(), trainer(FillModel(whole, part="net"))
    started.fit(module, data())
    trained = weights(module)
    for stage in STAGES[1:]:
        getattr(started, stage)(module, data())
    trainer(FillModel(whole, part="net")).validate(module, data(), verbose=False)
    assert different(weights(module), trained) == []


def saved(whole: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of Lightning's after three steps, and the weights in it."""
    module, started = Module(LoadEagerly(whole)), trainer()
    started.fit(module, data())
    path = whole.with_name("saved.ckpt")
    started.save_checkpoint(path)
    content = torch.load(path, weights_only=False)
    change(content["state_dict"])
    torch.save(content, path)
    return path, weights(module)


@pytest.mark.parametrize("declared", [None, "gone.pt"])
def test_a_checkpoint_to_resume_from_fills_the_model_alone(whole: Path, declared: str | None) -> None:
    path, expected = saved(whole)
    module = Module()
    trainer(FillModel(declared)).validate(module, data(), ckpt_path=path, weights_only=False, verbose=False)
    assert different(weights(module), expected) == []


def test_training_goes_on_as_lightnings_does(whole: Path) -> None:
    path, _ = saved(whole)
    ours, theirs = Module(), Module(LoadEagerly(whole))
    for module, callbacks in (ours, [FillModel()]), (theirs, []):
        trainer(*callbacks, max_steps=5).fit(module, data(), ckpt_path=path, weights_only=False)
    assert different(weights(ours), weights(theirs)) == []


def test_a_lenient_resume_keeps_what_was_declared_for_the_rest(whole: Path) -> None:
    def only_the_head(state: dict[str, Any]) -> None:
        for name in [name for name in state if "head" not in name]:
            del state[name]

    path, trained = saved(whole, only_the_head)
    ours, theirs = Module(), Module(LoadEagerly(whole))
    for module, callbacks in (ours, [FillModel(whole, part="net")]), (theirs, []):
        module.strict_loading = False
        trainer(*callbacks).validate(module, data(), ckpt_path=path, weights_only=False, verbose=False)
    assert different(weights(ours), weights(theirs)) == []
    assert torch.equal(weights(ours)["net.head.weight"], trained["net.head.weight"])


class LoadsWhatIsThere(Module):
    """Overrides a load, as for checkpoints of adapters alone."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, False, assign)


class PutsInWhatIsNotThere(Module):
    """Changes the checkpoint in Lightning's hook for that."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value.clone() for name, value in self.state_dict().items()} | checkpoint[
            "state_dict"
        ]


@pytest.mark.parametrize("module_class", [LoadsWhatIsThere, PutsInWhatIsNotThere])
def test_load_code_of_the_module_meets_what_was_declared(whole: Path, module_class: type[Module]) -> None:
    path, _ = saved(whole, lambda state: state.pop("net.body.0.weight"))
    ours, theirs = module_class(), module_class(LoadEagerly(whole))
    for module, callbacks in (ours, [FillModel(whole, part="net")]), (theirs, []):
        trainer(*callbacks).validate(module, data(), ckpt_path=path, weights_only=False, verbose=False)
    assert different(weights(ours), weights(theirs)) == []


class Forgiving(Module):
    """Lets a hook forget what a strict load misses."""

    def configure_model(self) -> None:
        super().configure_model()
        self.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())


def test_a_hook_cannot_let_a_resume_leave_out_what_was_declared(whole: Path) -> None:
    path, _ = saved(whole, lambda state: state.pop("net.body.0.weight"))
    with pytest.raises(FabricInitError, match=r"has not brought net\.body\.0\.weight"):
        trainer(FillModel(whole, part="net")).validate(Forgiving(), data(), ckpt_path=path, weights_only=False)


def test_a_strict_resume_from_too_little_fails_as_lightnings_does(whole: Path) -> None:
    path, _ = saved(whole, lambda state: state.pop("net.head.weight"))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"net\.head\.weight\""):
        trainer(FillModel()).validate(Module(), data(), ckpt_path=path, weights_only=False, verbose=False)


def test_a_checkpoint_of_lightnings_may_be_declared(whole: Path) -> None:
    path, expected = saved(whole)
    module = Module()
    trainer(FillModel(path)).validate(module, data(), verbose=False)
    assert different(weights(module), expected) == []


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_runs_a_model_that_nobody_fills(stage: str) -> None:
    with pytest.raises(UninitializedTensorError, match=r"net\.body\.0\.weight"):
        getattr(trainer(), stage)(in_deferred_init(None), data())


def test_load_from_checkpoint_may_be_called_in_a_recorded_block_and_outside(whole: Path) -> None:
    path, expected = saved(whole)
    started = FillModel().attach(trainer())
    with deferred_init():
        first = Early.load_from_checkpoint(path, weights_only=False)
    with started.init_module(empty_init=True):
        second = Early.load_from_checkpoint(path, weights_only=False)
    for module in first, second, Early.load_from_checkpoint(path, weights_only=False):
        started.validate(module, data(), verbose=False)
        assert different(weights(module), expected) == []


@pytest.mark.parametrize("empty_init", [None, False])
def test_init_module_builds_with_values_unless_it_is_told_otherwise(empty_init: bool | None) -> None:
    started = FillModel().attach(trainer())
    torch.manual_seed(3)
    with started.init_module(empty_init=empty_init):
        module = Early()
    torch.manual_seed(3)
    assert different(weights(module), weights(Early())) == []


def test_the_precision_of_the_trainer_holds(whole: Path) -> None:
    ours, theirs = Module(), Module(LoadEagerly(whole))
    trainer(FillModel(whole, part="net"), plugins=DoublePrecision()).fit(ours, data())
    trainer(plugins=DoublePrecision()).fit(theirs, data())
    assert different(weights(ours), weights(theirs)) == []
    assert {tensor.dtype for tensor in weights(ours).values()} == {torch.float64}


def test_half_precision_is_what_lightning_makes_of_the_loaded_weights(whole: Path) -> None:
    ours, theirs = Module(), Module(LoadEagerly(whole))
    trainer(FillModel(whole, part="net"), precision="bf16-true").validate(ours, data(), verbose=False)
    trainer(precision="bf16-true").validate(theirs, data(), verbose=False)
    assert different(weights(ours), weights(theirs)) == []


def test_the_report_names_the_line_of_the_model() -> None:
    module = Module()
    trainer(FillModel()).validate(module, data(), verbose=False)
    (row,) = [row for row in init_report(module).measure().rows if row.name == "net.head.weight"]
    assert row.rule == "normal_(mean=0, std=0.02)"
    assert str(row.file).endswith("tests/trainer/models.py")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_for_a_model_that_has_values_is_refused(whole: Path) -> None:
    with pytest.raises(RecordingError, match="built with values"):
        trainer(FillModel(whole, part="net")).fit(Early(), data())


def test_options_of_a_load_need_a_checkpoint() -> None:
    with pytest.raises(OptionError, match="strict=False"):
        FillModel(strict=False)
    with pytest.raises(OptionError, match="part"):
        FillModel(part="net")


def test_a_part_that_is_not_there_is_named_with_those_that_are(whole: Path) -> None:
    with pytest.raises(OptionError, match=r"part='model': Module has no such part; it has net"):
        trainer(FillModel(whole, part="model")).fit(Module(), data())


def test_a_trainer_takes_one_of_them(whole: Path) -> None:
    with pytest.raises(OptionError, match="another FillModel"):
        trainer(FillModel(whole), FillModel()).fit(Module(), data())


@pytest.mark.filterwarnings("ignore:`trainer.init_module` cannot fully support")  # Lightning's, of DeepSpeed
@pytest.mark.parametrize("name", [name for name in StrategyRegistry if name.startswith("deepspeed")])
def test_what_the_names_of_deepspeed_stand_for_records_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedStrategy, "setup_environment", lambda self: None)  # which asks for GPUs
    started = FillModel().attach(trainer(strategy=name))
    with started.init_module(empty_init=True):
        module = Early()
    assert isinstance(started.strategy, DeepSpeedStrategy)
    assert len(unfilled(module)) == 9  # also under stage 3, which partitions what has values as it is built


def test_a_precision_with_layers_of_its_own_is_refused_by_name() -> None:
    precision = type("BitsandbytesPrecision", (DoublePrecision,), {})()
    with pytest.raises(FabricInitError, match="BitsandbytesPrecision"):
        FillModel().attach(trainer(plugins=precision))


# -- other ways to Lightning -------------------------------------------------------------------------------------------


def run(source: str, *, folder: Path) -> None:
    """Run a program: these packages would stay imported in the process of the tests."""
    code = textwrap.dedent(source)
    arguments = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_pytorch_lightning_works_as_well(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning", reason="is a package of its own", exc_type=ImportError)
    program = """
        import pytorch_lightning as pl, torch
        from fabric_init import FillModel
        class Module(pl.LightningModule):
            def configure_model(self):
                self.net = torch.nn.Linear(2, 2)
            def predict_step(self, batch):
                return self.net(batch)
        torch.save({"weight": torch.eye(2), "bias": torch.ones(2)}, "net.pt")
        trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[FillModel("net.pt", part="net")])
        (found,) = trainer.predict(Module(), torch.utils.data.DataLoader(torch.eye(2), batch_size=2))
        assert torch.equal(found, torch.eye(2) + 1), found
    """
    run(program, folder=tmp_path)


def test_lightning_cli_takes_it_from_a_file(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse", reason="LightningCLI needs it")
    program = """
        import torch
        from lightning.pytorch import LightningDataModule, LightningModule
        from lightning.pytorch.cli import LightningCLI
        class Module(LightningModule):
            def configure_model(self):
                self.net = torch.nn.Linear(2, 2)
            def predict_step(self, batch):
                return self.net(batch)
        class Data(LightningDataModule):
            def predict_dataloader(self):
                return torch.utils.data.DataLoader(torch.eye(2))
        torch.save({"weight": torch.eye(2), "bias": torch.ones(2)}, "net.pt")
        open("given.yaml", "w").write('''
        trainer:
          accelerator: cpu
          logger: false
          callbacks:
          - class_path: fabric_init.FillModel
            init_args: {checkpoint: net.pt, part: net}
        ''')
        cli = LightningCLI(Module, Data, args=["predict", "--config", "given.yaml"])
        assert torch.equal(cli.model.net.weight, torch.eye(2))
    """
    run(program, folder=tmp_path)


def test_the_strategy_of_a_trainer_that_records_can_be_sent_to_spawned_processes(whole: Path) -> None:
    started = FillModel(whole, part="net").attach(trainer())
    sent = pickle.loads(pickle.dumps(started.strategy))
    assert (type(sent), sent.root_device) == (type(started.strategy), started.strategy.root_device)
    assert sent.declared == started.strategy.declared
