"""``Fabric.init_module`` on one device: every row of the table in its docstring, and what a user does afterwards."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, get_type_hints

import lightning
import pytest
import torch
from lightning.fabric.wrappers import _FabricModule
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import (
    CheckpointMismatchError,
    CheckpointNotFoundError,
    Fabric,
    FabricInitError,
    InitReport,
    RecordingError,
    UninitializedTensorError,
    deferred_init,
    materialize,
)
from tests.support.recordings import is_recorded

PRECISIONS = ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed"]


class Block(nn.Module):
    """A bit of everything: a tied head, norms, buffers of three kinds, an init of its own over torch's."""

    def __init__(self, width: int = 8, vocabulary: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("angles", torch.arange(width).float() / width, persistent=False)
        self.plain = torch.linspace(0, 1, width)
        self.apply(self._own_init)

    @staticmethod
    def _own_init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                module.bias.data.uniform_(-1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.hidden(self.embedding(tokens).mean(1)) * self.scale + self.angles.to(self.scale.dtype)
        return self.head(hidden)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(7)
    state = {name: tensor.detach().clone() for name, tensor in Block().state_dict().items()}
    torch.save(state, tmp_path / "block.pt")
    return tmp_path / "block.pt", state


TOKENS = torch.arange(12).reshape(4, 3)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    plain = {"plain": model.plain} if isinstance(getattr(model, "plain", None), Tensor) else {}
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers()), **plain}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.stride() == other[name].stride(), name
        assert torch.equal(tensor, other[name]), name


def hooks_of(model: nn.Module) -> dict[tuple[str, str], int]:
    return {
        (name, table): len(hooks)
        for name, module in model.named_modules()
        for table, hooks in vars(module).items()
        if "hooks" in table and "kwargs" not in table
    }


# -- the first row: eager ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arguments", [{}, {"empty_init": False}, {"empty_init": None}], ids=str)
def test_without_empty_init_the_model_is_the_one_that_lightning_builds(precision: Any, arguments: dict) -> None:
    models = []
    for kind, options in ((lightning.Fabric, {}), (Fabric, arguments)):
        torch.manual_seed(3)
        with kind(accelerator="cpu", devices=1, precision=precision).init_module(**options):
            models.append(Block())
    assert_same(tensors(models[0]), tensors(models[1]))
    assert hooks_of(models[0]) == hooks_of(models[1])
    assert {str(tensor.device) for tensor in tensors(models[1]).values()} == {"cpu"}


def test_without_empty_init_there_is_no_report_and_the_error_says_why(fabric: Fabric) -> None:
    with fabric.init_module():
        model = nn.Linear(2, 2)
    with pytest.raises(FabricInitError, match=r"no init report for this Linear(.|\n)*init_module"):
        fabric.init_report(model)


# -- the second row: empty_init=True -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty_init_allocates_in_the_dtype_of_the_precision_and_fills_nothing(precision: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with lightning.Fabric(accelerator="cpu", devices=1, precision=precision).init_module():
        eager = tensors(Block())
    with fabric.init_module(empty_init=True):
        model = Block()
    for name, tensor in tensors(model).items():
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (
            eager[name].dtype,
            eager[name].shape,
            eager[name].stride(),
        )
        assert tensor.device.type == "cpu", name
    report = fabric.init_report(model)
    status = {row.name: row.status for row in report.rows}
    saved = {name for name, _ in [*model.named_parameters(), *model.hidden[1].named_buffers("hidden.1")]} | {"steps"}
    saved.remove("hidden.1.num_batches_tracked")  # torch.tensor(0): a value that torch brings in from Python
    assert {name for name in status if status[name] == "unfilled"} == saved
    assert not report.complete
    # what no checkpoint brings has its values already
    assert torch.equal(model.angles, eager["angles"])
    assert torch.equal(model.plain, eager["plain"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_init_missing_gives_values_of_the_right_dtype_and_of_the_right_spread(precision: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with fabric.init_module(empty_init=True):
        model = Block(width=64, vocabulary=100)
    fabric.init_missing(model)
    weight = model.hidden[0].weight.detach().double()
    assert 0.015 < weight.std() < 0.025
    assert 0.9 < model.embedding.weight.detach().double().std() < 1.1 or (
        0.015 < model.embedding.weight.detach().double().std() < 0.025  # tied to the head, which is initialized after
    )
    assert torch.equal(model.scale, torch.ones_like(model.scale))
    assert fabric.init_report(model).complete


def test_empty_init_is_off_by_default_so_that_nobody_gets_garbage_unasked(fabric: Fabric) -> None:
    with fabric.init_module():
        model = nn.BatchNorm1d(4)
    assert torch.equal(model.weight, torch.ones(4))


def load_with_fabric_load(fabric: Fabric, model: nn.Module, path: Path, state: dict[str, Tensor]) -> None:
    fabric.save(path.with_name("wrapped.ckpt"), {"model": state})
    fabric.load(path.with_name("wrapped.ckpt"), {"model": model})


LOADS: dict[str, Callable[[Fabric, nn.Module, Path, dict[str, Tensor]], object]] = {
    "fabric.load": load_with_fabric_load,
    "fabric.load_raw": lambda fabric, model, path, state: fabric.load_raw(path, model),
    "load_state_dict": lambda fabric, model, path, state: model.load_state_dict(state),
    "assign": lambda fabric, model, path, state: model.load_state_dict(copy.deepcopy(state), assign=True),
    "not strict": lambda fabric, model, path, state: model.load_state_dict({**state, "x": torch.ones(1)}, strict=False),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("set_up", [False, True], ids=["before setup", "after setup"])
def test_every_way_to_load_completes_the_model(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], load: Callable[..., object], set_up: bool
) -> None:
    path, state = checkpoint
    with fabric.init_module(empty_init=True):
        model = Block()
    handle = fabric.setup(model) if set_up else model
    load(fabric, handle, path, state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert handle(TOKENS).isfinite().all()
    assert hooks_of(model) == hooks_of(Block())
    report = fabric.init_report(handle)
    assert {row.status for row in report.rows if row.kind == "parameter"} == {"loaded"}
    assert report.complete


@pytest.mark.parametrize("set_up", [False, True], ids=["before setup", "after setup"])
@pytest.mark.parametrize("how", ["load", "load_raw", "load_state_dict", "assign"])
def test_a_load_that_is_not_strict_completes_the_model_with_its_own_init(
    fabric: Fabric, tmp_path: Path, how: str, set_up: bool
) -> None:
    state = {"scale": torch.full((8,), 5.0), "hidden.0.bias": torch.full((8,), 6.0)}
    torch.save(state, tmp_path / "part.pt")
    torch.save({"model": state}, tmp_path / "part.ckpt")
    with fabric.init_module(empty_init=True):
        model = Block()
    handle = fabric.setup(model) if set_up else model
    if how == "load":
        fabric.load(tmp_path / "part.ckpt", {"model": handle}, strict=False)
    elif how == "load_raw":
        fabric.load_raw(tmp_path / "part.pt", handle, strict=False)
    else:
        handle.load_state_dict(state, strict=False, assign=how == "assign")
    assert torch.equal(model.scale, state["scale"])
    assert torch.equal(model.hidden[0].bias, state["hidden.0.bias"])
    assert torch.equal(model.hidden[1].running_var, torch.ones(8))
    assert model.steps == 0
    assert 0.01 < model.hidden[0].weight.std() < 0.03
    assert handle(TOKENS).isfinite().all()
    assert hooks_of(model) == hooks_of(Block())
    report = fabric.init_report(model)
    by_status = {row.name: row.status for row in report.rows}
    assert by_status["scale"] == by_status["hidden.0.bias"] == "loaded"
    assert by_status["hidden.0.weight"] == by_status["steps"] == "initialized"
    assert report.complete


def test_a_model_may_come_in_parts_from_two_loads(fabric: Fabric) -> None:
    torch.manual_seed(1)
    source = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].load_state_dict(source[0].state_dict())
    with pytest.raises(UninitializedTensorError) as caught:
        model(torch.ones(1, 3))
    assert "1.weight" in str(caught.value)
    assert "0.weight" not in str(caught.value)
    model[1].load_state_dict(source[1].state_dict())
    assert torch.equal(model(torch.ones(1, 3)), source(torch.ones(1, 3)))
    assert fabric.init_report(model).count("loaded") == 4


def test_two_loads_that_are_not_strict_bring_what_each_of_them_has(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Linear(3, 3)
    model.load_state_dict({"weight": torch.full((3, 3), 2.0)}, strict=False)
    model.load_state_dict({"bias": torch.full((3,), 3.0)}, strict=False)
    assert torch.equal(model.weight, torch.full((3, 3), 2.0))
    assert torch.equal(model.bias, torch.full((3,), 3.0))
    assert torch.equal(model(torch.ones(1, 3)), torch.full((1, 3), 9.0))


def test_what_the_first_of_two_loads_lacks_may_come_with_the_second_although_the_model_never_initializes_it(
    fabric: Fabric,
) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Parameter(torch.empty(2))
            self.ones = nn.Parameter(torch.ones(2))

    with fabric.init_module(empty_init=True):
        model = Half()
    model.load_state_dict({"ones": torch.full((2,), 2.0)}, strict=False)
    with pytest.raises(UninitializedTensorError, match="never"):
        model.state_dict()["never"].tolist()
    model.load_state_dict({"never": torch.full((2,), 3.0)}, strict=False)
    assert torch.equal(model.ones, torch.full((2,), 2.0))
    assert torch.equal(model.never, torch.full((2,), 3.0))
    assert model.state_dict().keys() == {"ones", "never"}


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=["half", "bf16", "double"])
@pytest.mark.parametrize("complete", ["init_missing", "load", "assign"])
def test_a_cast_in_between_neither_fills_the_model_nor_gets_lost(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], cast: Callable[[nn.Module], nn.Module], complete: str
) -> None:
    with fabric.init_module(empty_init=True):
        model = Block()
    cast(model)
    dtype = cast(nn.Linear(1, 1)).weight.dtype
    with pytest.raises(UninitializedTensorError, match=r"hidden\.0\.weight"):
        model(TOKENS)
    with pytest.raises(UninitializedTensorError, match=r"hidden\.1\.running_mean"):
        torch.save(model.state_dict(), BytesIO())
    if complete == "init_missing":
        fabric.init_missing(model)
        assert torch.equal(model.hidden[1].running_var, torch.ones(8, dtype=dtype))
    else:
        state = {
            name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in checkpoint[1].items()
        }
        model.load_state_dict(state, assign=complete == "assign")
        assert torch.equal(model.scale, state["scale"])
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.int64 if "steps" in name or "tracked" in name else dtype), name
        assert tensor.isfinite().all(), name
    assert model(TOKENS).isfinite().all()
    for row in fabric.init_report(model).rows:
        if row.kind == "parameter":
            assert row.dtype == str(dtype).removeprefix("torch."), "the report gives the dtype that the tensor has"


def test_init_missing_after_a_cast_gives_the_values_of_the_recorded_dtype_cast(fabric: Fabric) -> None:
    values = []
    for cast in (False, True):
        torch.manual_seed(5)
        with fabric.init_module(empty_init=True):
            model = nn.Linear(6, 6)
        if cast:
            model.half()
        fabric.init_missing(model)
        values.append(model.weight.detach())
    assert torch.equal(values[0].half(), values[1])


def writes() -> dict[str, Callable[[nn.Linear], object]]:
    @torch.no_grad()
    def under_no_grad(model: nn.Linear) -> None:
        model.weight.normal_()
        model.bias.zero_()

    def through_data(model: nn.Linear) -> None:
        model.weight.data.normal_()
        model.bias.data.zero_()

    def by_nn_init(model: nn.Linear) -> None:
        nn.init.xavier_uniform_(model.weight)
        nn.init.zeros_(model.bias)

    def by_setting_data(model: nn.Linear) -> None:
        model.weight.data = torch.randn(4, 4)
        model.bias.data = torch.zeros(4)

    def by_new_parameters(model: nn.Linear) -> None:
        model.weight = nn.Parameter(torch.randn(4, 4))
        model.bias = nn.Parameter(torch.zeros(4))

    def by_copying(model: nn.Linear) -> None:
        model.weight.data.copy_(torch.randn(4, 4))
        model.bias.detach().copy_(torch.zeros(4))

    return {
        "under no_grad": under_no_grad,
        "through .data": through_data,
        "by nn.init": by_nn_init,
        "by p.data = t": by_setting_data,
        "by new parameters": by_new_parameters,
        "by copying": by_copying,
        "by reset_parameters": lambda model: model.reset_parameters(),
    }


@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
@pytest.mark.parametrize("write", writes().values(), ids=writes())
def test_the_users_own_writes_fill_a_tensor_and_are_named_so(
    fabric: Fabric, write: Callable[[nn.Linear], object], half: bool
) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Linear(4, 4)
    if half:
        model.half()
    write(model)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    fabric.init_missing(model)
    assert torch.equal(model.weight, before[0])
    assert torch.equal(model.bias, before[1])
    assert model.state_dict().keys() == {"weight", "bias"}
    assert {row.status for row in fabric.init_report(model).rows} == {"written by the user"}
    assert hooks_of(model) == hooks_of(nn.Linear(4, 4))


def test_init_missing_leaves_alone_what_was_loaded_or_written(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].load_state_dict({"weight": torch.full((2, 2), 4.0), "bias": torch.full((2,), 5.0)})
    nn.init.constant_(model[1].weight, 6.0)
    fabric.init_missing(model)
    assert torch.equal(model[0].weight, torch.full((2, 2), 4.0))
    assert torch.equal(model[1].weight, torch.full((2, 2), 6.0))
    assert torch.equal(model[2].weight, torch.ones(2))
    status = {row.name: row.status for row in fabric.init_report(model).rows}
    assert status["0.weight"] == "loaded"
    assert status["1.weight"] == "written by the user"
    assert status["1.bias"] == "initialized"


def test_init_missing_on_what_setup_returned_and_twice_is_fine(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    handle = fabric.setup(model)
    fabric.init_missing(handle)
    before = model.weight.detach().clone()
    fabric.init_missing(handle)
    assert torch.equal(model.weight, before)


def test_init_missing_of_a_part_fills_that_part(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fabric.init_missing(model[0])
    assert model[0].weight.isfinite().all()
    assert model[0](torch.ones(1, 2)).isfinite().all()
    with pytest.raises(UninitializedTensorError) as caught:
        model(torch.ones(1, 2))
    assert "  0.weight\n" not in str(caught.value)
    assert "  1.weight\n" in str(caught.value)


def test_a_part_outlives_the_model_that_it_was_built_in(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    part = model[0]
    del model
    with pytest.raises(UninitializedTensorError, match=r"(?m)^  0\.weight$") as caught:
        part(torch.ones(1, 2))
    assert "NoneType" not in str(caught.value)
    part.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    assert torch.equal(part(torch.ones(1, 2)), torch.full((1, 2), 2.0))


# -- the third row: checkpoint= ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_declared_checkpoint_fills_the_model_in_its_precision(
    checkpoint: tuple[Path, dict[str, Tensor]], precision: Any
) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with fabric.init_module(checkpoint=checkpoint[0]):
        model = Block()
    with lightning.Fabric(accelerator="cpu", devices=1, precision=precision).init_module():
        expected = Block()
    expected.load_state_dict(checkpoint[1])
    assert_same(tensors(expected), tensors(model))
    assert model.head.weight is model.embedding.weight
    assert hooks_of(model) == hooks_of(Block())
    report = fabric.init_report(model)
    casts = {row.cast_from for row in report.rows if row.kind == "parameter"}
    assert casts == ({None} if precision in ("32-true", "bf16-mixed") else {"float32"})
    expected.eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS), expected(TOKENS))


def test_a_safetensors_file_with_one_of_two_tied_keys_fills_both(fabric: Fabric, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in Block().state_dict().items() if name != "embedding.weight"}
    save_file(state, tmp_path / "model.safetensors")
    with fabric.init_module(checkpoint=tmp_path):
        model = Block()
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, state["head.weight"])


@pytest.mark.parametrize(
    "rename",
    [{r"^module\.": ""}, lambda key: key.removeprefix("module.") if key != "ema" else None],
    ids=["regex", "callable"],
)
def test_rename_maps_checkpoint_keys_to_tensor_names(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], rename: Any
) -> None:
    path = checkpoint[0].with_name("prefixed.pt")
    extra = {"ema": torch.ones(1)} if callable(rename) else {}
    torch.save({**{f"module.{name}": tensor for name, tensor in checkpoint[1].items()}, **extra}, path)
    with fabric.init_module(checkpoint=path, rename=rename):
        model = Block()
    assert torch.equal(model.scale, checkpoint[1]["scale"])
    report = fabric.init_report(model)
    assert next(row.origin for row in report.rows if row.name == "scale") == "module.scale"
    assert report.unexpected == ()


def test_reinit_names_what_is_initialized_afresh_although_the_file_has_it(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]]
) -> None:
    with fabric.init_module(checkpoint=checkpoint[0], reinit=["hidden.1.*", "sca?e"]):
        model = Block()
    assert torch.equal(model.hidden[1].running_var, torch.ones(8))
    assert torch.equal(model.scale, torch.ones(8))
    assert torch.equal(model.hidden[0].weight, checkpoint[1]["hidden.0.weight"])
    status = {row.name: row.status for row in fabric.init_report(model).rows}
    assert status["scale"] == status["hidden.1.weight"] == "initialized"
    assert status["hidden.0.weight"] == "loaded"


def test_reinit_makes_room_for_a_head_of_another_shape(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]]
) -> None:
    class NewHead(Block):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3, bias=False)

    with fabric.init_module(checkpoint=checkpoint[0], reinit=["head.*"]):
        model = NewHead()
    assert model.head.weight.shape == (3, 8)
    assert model.head.weight.isfinite().all()
    assert torch.equal(model.embedding.weight, checkpoint[1]["embedding.weight"])


def test_not_strict_gives_what_is_missing_the_models_own_init_and_ignores_the_rest(
    fabric: Fabric, tmp_path: Path
) -> None:
    torch.save({"scale": torch.full((8,), 3.0), "other": torch.ones(2)}, tmp_path / "part.pt")
    with fabric.init_module(checkpoint=tmp_path / "part.pt", strict=False):
        model = Block()
    assert torch.equal(model.scale, torch.full((8,), 3.0))
    assert torch.equal(model.hidden[1].weight, torch.ones(8))
    report = fabric.init_report(model)
    assert report.unexpected == ("other",)
    assert report.count("loaded") == 1
    assert report.complete


def test_what_the_constructor_did_to_a_parameter_survives(fabric: Fabric, tmp_path: Path) -> None:
    fired = []

    class Marked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.weight.is_special = {"lr": 3}
            self.weight.register_hook(lambda grad: fired.append("hook"))
            self.weight.register_post_accumulate_grad_hook(lambda p: fired.append("after"))
            self.bias.requires_grad_(False)

    torch.save({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, tmp_path / "m.pt")
    for options in ({"checkpoint": tmp_path / "m.pt"}, {"empty_init": True}):
        with fabric.init_module(**options):
            model = Marked()
            weight = model.weight
        assert model.weight is weight
        fabric.init_missing(model)
        assert model.weight is weight
        assert model.weight.is_special == {"lr": 3}
        assert model.weight.requires_grad
        assert not model.bias.requires_grad
        fired.clear()
        model(torch.ones(1, 2)).sum().backward()
        assert fired == ["hook", "after"]


# -- the guarantee -----------------------------------------------------------------------------------------------------


def test_a_forgotten_load_raises_at_the_first_forward_with_every_name_and_the_three_ways_out(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(60)))
    with pytest.raises(UninitializedTensorError) as caught:
        fabric.setup(model)(torch.ones(1, 1))
    message = str(caught.value)
    assert [name for name, _ in model.named_parameters() if f"  {name}\n" not in message] == []
    for way in ("load_state_dict", "checkpoint=", "init_missing"):
        assert way in message


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "set up"])
def test_an_unfilled_model_cannot_be_saved(fabric: Fabric, tmp_path: Path, wrapped: bool) -> None:
    with fabric.init_module(empty_init=True):
        model = Block()
    handle = fabric.setup(model) if wrapped else model
    with pytest.raises(UninitializedTensorError, match="scale"):
        fabric.save(tmp_path / "x.ckpt", {"model": handle})
    with pytest.raises(UninitializedTensorError, match="scale"):
        torch.save(handle.state_dict(), tmp_path / "x.pt")
    with pytest.raises(UninitializedTensorError, match="scale"):
        torch.save(model, tmp_path / "x.pt")
    fabric.init_missing(handle)
    fabric.save(tmp_path / "x.ckpt", {"model": handle})
    assert torch.equal(torch.load(tmp_path / "x.ckpt")["model"]["scale"], torch.ones(8))


# -- setup, training, saving -------------------------------------------------------------------------------------------


def train(model: Callable[[Tensor], Tensor], optimizer: Any, backward: Callable[[Tensor], object]) -> list[float]:
    losses = []
    for step in range(3):
        loss = nn.functional.cross_entropy(model(TOKENS), torch.arange(4) + step)
        losses.append(loss.item())
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    return losses


@pytest.mark.parametrize("way", ["setup", "setup one by one", "optimizer made before the load"])
@pytest.mark.parametrize("options", ["checkpoint", "empty_init"])
def test_training_goes_as_in_plain_pytorch_from_the_same_weights(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], way: str, options: str
) -> None:
    path, state = checkpoint
    plain = Block()
    plain.load_state_dict(state)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    expected = train(plain, optimizer, Tensor.backward)

    with fabric.init_module(**({"checkpoint": path} if options == "checkpoint" else {"empty_init": True})):
        model = Block()
    if options == "empty_init" and way != "optimizer made before the load":
        model.load_state_dict(state)
    mine = torch.optim.AdamW(model.parameters(), lr=0.1)
    if way == "setup one by one":
        handle, mine = fabric.setup_module(model), fabric.setup_optimizers(mine)
    else:
        handle, mine = fabric.setup(model, mine)
    if options == "empty_init" and way == "optimizer made before the load":
        fabric.load_raw(path, handle)
    assert train(handle, mine, fabric.backward) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_save_and_load_round_trip_with_the_optimizer(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    with fabric.init_module(checkpoint=checkpoint[0]):
        model = Block()
    handle, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    train(handle, optimizer, fabric.backward)
    fabric.save(tmp_path / "run.ckpt", {"model": handle, "optimizer": optimizer, "step": 3})
    expected = train(handle, optimizer, fabric.backward)

    with fabric.init_module(empty_init=True):
        again = Block()
    state = {"model": again, "optimizer": torch.optim.AdamW(again.parameters(), lr=0.1), "step": 0}
    state["model"], state["optimizer"] = fabric.setup(state["model"], state["optimizer"])
    fabric.load(tmp_path / "run.ckpt", state)
    assert state["step"] == 3
    assert train(state["model"], state["optimizer"], fabric.backward) == expected

    with fabric.init_module(checkpoint=tmp_path / "run.ckpt"):  # Fabric's own file, with the model under "model"
        third = Block()
    report = fabric.init_report(third)
    assert "model" in str(report.note)
    assert torch.equal(third.scale, torch.load(tmp_path / "run.ckpt")["model"]["scale"])


def test_training_never_writes_to_the_file_that_the_weights_are_mapped_from(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]]
) -> None:
    before = checkpoint[0].read_bytes()
    with fabric.init_module(checkpoint=checkpoint[0]):
        model = Block()
    handle, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    train(handle, optimizer, fabric.backward)
    assert not torch.equal(model.scale, checkpoint[1]["scale"])
    assert checkpoint[0].read_bytes() == before


def test_a_recorded_model_cannot_be_set_up_before_it_has_memory(fabric: Fabric) -> None:
    with deferred_init():
        model = nn.Linear(2, 2)
    for setup in (fabric.setup, fabric.setup_module):
        with pytest.raises(RecordingError, match=r"weight(.|\n)*materialize"):
            setup(model)
    materialize(model)
    assert fabric.setup(model)(torch.ones(1, 2)).isfinite().all()


# -- blocks in all arrangements ----------------------------------------------------------------------------------------


def test_a_model_made_in_two_blocks_is_whole(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        body = nn.Linear(3, 3)
    with fabric.init_module(empty_init=True):
        head = nn.Linear(3, 1)
    model = nn.Sequential(body, head)
    with pytest.raises(UninitializedTensorError):
        model(torch.ones(1, 3))
    fabric.init_missing(model)
    assert model(torch.ones(1, 3)).isfinite().all()
    assert fabric.init_report(body).count("initialized") == 2


def test_the_second_block_may_build_on_the_first(fabric: Fabric) -> None:
    with deferred_init():
        body = nn.Linear(3, 3)
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(body, nn.Linear(3, 1))
    with pytest.raises(UninitializedTensorError, match=r"(?s)0\.weight.*1\.weight"):
        model(torch.ones(1, 3))
    fabric.init_missing(model)
    assert model(torch.ones(1, 3)).isfinite().all()


def test_a_new_head_for_a_model_that_is_there_already(fabric: Fabric) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    body = model[0].weight.detach().clone()
    with fabric.init_module(empty_init=True):
        model[1] = nn.Linear(3, 5)
    with pytest.raises(UninitializedTensorError, match=r"weight"):
        model(torch.ones(1, 3))
    fabric.init_missing(model)
    assert model(torch.ones(1, 3)).shape == (1, 5)
    assert torch.equal(model[0].weight, body)


def test_two_models_in_one_block_are_both_guarded_and_both_filled(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        actor, critic = nn.Linear(4, 4), nn.Linear(4, 4)
    for model in (actor, critic):
        with pytest.raises(UninitializedTensorError):
            model(torch.ones(1, 4))
    fabric.init_missing(actor)
    with pytest.raises(UninitializedTensorError):
        critic(torch.ones(1, 4))
    fabric.init_missing(critic)
    assert not torch.equal(actor.weight, critic.weight)


def test_two_models_that_share_a_tensor_are_both_guarded(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        one, other = nn.Sequential(nn.Linear(3, 3, bias=False)), nn.Sequential(nn.Linear(3, 3, bias=False))
        other[0].weight = one[0].weight
    for model in (one, other):
        with pytest.raises(UninitializedTensorError, match=r"0\.weight"):
            model(torch.ones(1, 3))
    fabric.init_missing(one)
    fabric.init_missing(other)
    assert one[0].weight is other[0].weight
    assert torch.equal(one(torch.ones(1, 3)), other(torch.ones(1, 3)))


def test_two_models_for_one_checkpoint_are_refused_by_name(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]]
) -> None:
    with (
        pytest.raises(RecordingError, match=r"2 models were built .*block\.pt.*Block, Linear"),
        fabric.init_module(checkpoint=checkpoint[0]),
    ):
        models = Block(), nn.Linear(2, 2)
    assert all(is_recorded(parameter) for model in models for parameter in model.parameters())
    materialize(models[0], checkpoint=checkpoint[0])
    assert torch.equal(models[0].scale, checkpoint[1]["scale"])


def test_a_model_that_was_dropped_in_the_block_does_not_count(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]]
) -> None:
    with fabric.init_module(checkpoint=checkpoint[0]):
        first = Block()
        first.itself = [first]  # a reference cycle keeps it until the collector comes
        del first
        model = Block()
    assert torch.equal(model.scale, checkpoint[1]["scale"])


@pytest.mark.parametrize("inner", [{}, {"empty_init": True}], ids=["eager", "recorded"])
def test_a_block_in_a_recorded_block_is_refused_and_nothing_stays_changed(fabric: Fabric, inner: dict) -> None:
    with (
        pytest.raises(RecordingError, match="one after the other"),
        fabric.init_module(empty_init=True),
        fabric.init_module(**inner),
    ):
        nn.Linear(2, 2)
    assert not is_recorded(nn.Linear(2, 2).weight)


def test_a_recorded_block_in_an_eager_one_is_fine(fabric: Fabric) -> None:
    with fabric.init_module():
        eager = nn.Linear(2, 2)
        with fabric.init_module(empty_init=True):
            model = nn.Linear(2, 2)
        after = nn.Linear(2, 2)
    assert eager(torch.ones(1, 2)).isfinite().all()
    assert after(torch.ones(1, 2)).isfinite().all()
    with pytest.raises(UninitializedTensorError):
        model(torch.ones(1, 2))


@pytest.mark.parametrize("options", [{"empty_init": True}, "checkpoint"], ids=["empty_init", "checkpoint"])
def test_a_block_that_builds_no_model_says_so(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], options: Any
) -> None:
    options = {"checkpoint": checkpoint[0]} if options == "checkpoint" else options
    with pytest.raises(RecordingError, match="no module was built"), fabric.init_module(**options):
        torch.randn(3)


def test_a_module_without_tensors_may_be_built_in_a_recorded_block(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.ReLU()
    assert torch.equal(model(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("options", [{"empty_init": True}, "checkpoint"], ids=["empty_init", "checkpoint"])
def test_a_constructor_that_raises_leaves_everything_as_it_was(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], options: Any
) -> None:
    options = {"checkpoint": checkpoint[0]} if options == "checkpoint" else options

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            raise KeyError("the constructor's own error")

    with pytest.raises(KeyError, match="the constructor's own error"), fabric.init_module(**options):
        Broken()
    torch.manual_seed(0)
    one = nn.Linear(2, 2).weight
    torch.manual_seed(0)
    assert torch.equal(nn.Linear(2, 2).weight, one)
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    fabric.init_missing(model)
    assert model.weight.isfinite().all()


def test_a_block_may_be_left_early(fabric: Fabric) -> None:
    def build() -> nn.Module:
        with fabric.init_module(empty_init=True):
            return nn.Linear(2, 2)

    model = build()
    with pytest.raises(UninitializedTensorError):
        model(torch.ones(1, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_models_may_be_built_where_gradients_are_off(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], mode: Any
) -> None:
    with mode():
        with fabric.init_module(empty_init=True):
            model = Block()
        with pytest.raises(UninitializedTensorError):
            model(TOKENS)
        model.load_state_dict(checkpoint[1])
        assert model.eval()(TOKENS).isfinite().all()
        with fabric.init_module(checkpoint=checkpoint[0]):
            loaded = Block()
        assert torch.equal(loaded.eval()(TOKENS), model(TOKENS))


# -- arguments that make no sense --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rename": {"a": "b"}}, "rename"),
        ({"reinit": ["head"]}, "reinit"),
        ({"strict": False}, "strict"),
        ({"empty_init": True, "rename": {"a": "b"}}, "checkpoint"),
    ],
    ids=str,
)
def test_options_of_a_load_without_a_checkpoint_are_refused(fabric: Fabric, options: dict, message: str) -> None:
    with pytest.raises(FabricInitError, match=message):
        fabric.init_module(**options)


def test_empty_init_false_contradicts_a_checkpoint(fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(FabricInitError, match=r"empty_init=False contradicts checkpoint"):
        fabric.init_module(empty_init=False, checkpoint=checkpoint[0])


def test_a_bad_path_fails_before_the_model_is_built(fabric: Fabric, tmp_path: Path) -> None:
    built = []
    with (
        pytest.raises(CheckpointNotFoundError, match="nothing here"),
        fabric.init_module(checkpoint=tmp_path / "nothing here"),
    ):
        built.append(nn.Linear(2, 2))
    assert built == []


def test_a_mismatch_leaves_the_recorded_model_for_another_try(
    fabric: Fabric, checkpoint: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.save({"scale": torch.ones(8)}, tmp_path / "part.pt")
    with pytest.raises(CheckpointMismatchError), fabric.init_module(checkpoint=tmp_path / "part.pt"):
        model = Block()
    with pytest.raises(RecordingError, match="no values yet"):
        fabric.setup(model)
    assert isinstance(materialize(model, checkpoint=checkpoint[0]), InitReport)
    assert torch.equal(model.scale, checkpoint[1]["scale"])
    assert fabric.setup(model)(TOKENS).isfinite().all()


@pytest.mark.parametrize("method", ["__init__", "setup", "setup_module", "setup_optimizers"])
def test_fabric_shows_lightnings_own_signatures(method: str) -> None:
    def parameters(cls: type) -> list[tuple[str, Any, Any]]:
        shown = inspect.signature(getattr(cls, method)).parameters.values()
        return [(parameter.name, parameter.kind, parameter.default) for parameter in shown]

    ours = [parameter for parameter in parameters(Fabric) if parameter[0] != "io"]
    assert ours == parameters(lightning.Fabric)
    assert ("io" in inspect.signature(getattr(Fabric, method)).parameters) == (method == "__init__")


def test_the_names_of_types_in_the_signature_can_be_resolved() -> None:
    hints = get_type_hints(Fabric.__init__)  # as jsonargparse does
    assert hints["num_nodes"] is int
    assert get_type_hints(Fabric.setup_module)["return"] is _FabricModule


def test_setup_before_launch_says_what_lightning_says() -> None:
    for set_up in ("setup", "setup_module"):
        with pytest.raises(RuntimeError, match=r"you must call `\.launch\(\)`"):
            getattr(Fabric(accelerator="cpu", devices=2, strategy="ddp"), set_up)(nn.Linear(2, 2))


def test_setup_takes_a_scheduler_and_returns_it() -> None:
    fabric, model = Fabric(accelerator="cpu", devices=1), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert fabric.setup(model, optimizer, scheduler=scheduler)[2] is scheduler


def test_fsdp2_is_registered_when_fabric_is_imported() -> None:
    code = "from lightning.fabric.strategies import STRATEGY_REGISTRY as r; assert 'fsdp2' not in r;"
    subprocess.run([sys.executable, "-c", f"{code} from fabric_init import Fabric; assert 'fsdp2' in r"], check=True)
