"""Modules, names and copies that take tensors without values over wait for them, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fabric_init import Fabric, UninitializedTensorError

X = torch.ones(2, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def model(fabric: Fabric) -> Model:
    with fabric.init_module(empty_init=True):
        return Model()


class Own(nn.Module):
    """Keeps the weight under the name that it had, as layers with adapters do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Around(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight)


def _same_tensors(model: Model) -> None:
    model.norm = nn.SyncBatchNorm.convert_sync_batchnorm(model.norm)


def _another_tensor_in_their_memory(model: Model) -> None:
    first = nn.Linear(4, 4)
    first.weight = nn.Parameter(model.first.weight.data)
    model.first = first


def _own_layer(model: Model) -> None:
    model.first = Own(model.first)


def _another_name(model: Model) -> None:
    model.first.other = model.first.weight
    del model.first.weight
    model.first.forward = lambda x: nn.functional.linear(x, model.first.other)


TAKEN_OVER = [_same_tensors, _another_tensor_in_their_memory, _own_layer, _another_name]


@pytest.mark.parametrize("take_over", TAKEN_OVER)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("complete", ["init_missing", "load"])
def test_what_takes_tensors_over_waits_for_them(
    fabric: Fabric, model: Model, take_over: Callable[[Model], None], copied: bool, complete: str
) -> None:
    if copied:
        model = copy.deepcopy(model)
    take_over(model)
    with pytest.raises(UninitializedTensorError, match=r"first\.(weight|other)"):
        model.eval()(X)
    if complete == "init_missing":
        fabric.init_missing(model)
    else:
        model.load_state_dict({"norm.running_mean": torch.ones(4)}, strict=False)
    assert model.norm.weight.tolist() == [1.0] * 4
    assert model.eval()(X).isfinite().all()


@pytest.mark.parametrize("wrap", [Own, Around, lambda linear: nn.Sequential(Around(linear))])
def test_a_model_of_taken_tensors_alone_is_guarded_from_setup_on(
    fabric: Fabric, model: Model, wrap: Callable[[nn.Linear], nn.Module]
) -> None:
    wrapped = fabric.setup(wrap(model.first))
    with pytest.raises(UninitializedTensorError, match=r"first\.weight"):
        wrapped(X)
    fabric.init_missing(wrapped)
    assert wrapped(X).isfinite().all()


REPARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": lambda module: parametrizations.weight_norm(module),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module),
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
}


@pytest.mark.parametrize("change", REPARAMETRISED.values(), ids=REPARAMETRISED)
def test_what_is_computed_from_no_values_waits_or_raises(
    fabric: Fabric, model: Model, change: Callable[[nn.Module], object]
) -> None:
    with suppress(UninitializedTensorError):
        change(model.first)
    with pytest.raises(UninitializedTensorError, match=r"first\."):
        model(X)


def test_what_weight_norm_computes_from_no_values_waits_for_a_load(fabric: Fabric, model: Model) -> None:
    parametrizations.weight_norm(model.first)
    with pytest.raises(UninitializedTensorError, match=r"first\.\S*original0"):
        model(X)
    other = Model()
    parametrizations.weight_norm(other.first)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.eval()(X), other.eval()(X))


def test_what_weight_norm_computes_follows_the_models_own_init(fabric: Fabric, model: Model) -> None:
    parametrizations.weight_norm(model.first)
    fabric.init_missing(model)
    weight = model.first.parametrizations.weight
    assert torch.allclose(weight.original0, weight.original1.norm(dim=1, keepdim=True))
    assert model(X).isfinite().all()


@pytest.mark.parametrize("change", REPARAMETRISED.values(), ids=REPARAMETRISED)
def test_a_layer_with_values_may_change_while_others_wait(
    fabric: Fabric, model: Model, change: Callable[[nn.Module], object]
) -> None:
    fabric.init_missing(model.first)
    change(model.first)
    fabric.init_missing(model)
    assert model(X).isfinite().all()


def test_modules_that_are_gone_are_not_asked_for(fabric: Fabric, model: Model) -> None:
    model.norm = nn.Identity()
    model.first.load_state_dict({"bias": torch.ones(4)}, strict=False)
    assert model(X).isfinite().all()


class Computed(nn.Module):
    """One part is computed from another, as DoRA's magnitudes are."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4, bias=False)
        self.rest = nn.Module()
        self.rest.norms = nn.Parameter(self.base.weight.detach().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) / self.rest.norms


def _loaded(model: Computed, value: Tensor) -> None:
    model.load_state_dict({"base.weight": value}, strict=False)


def _part_loaded(model: Computed, value: Tensor) -> None:
    model.base.load_state_dict({"weight": value})


def _written(model: Computed, value: Tensor) -> None:
    with torch.no_grad():
        model.base.weight.copy_(value)


def _put(model: Computed, value: Tensor) -> None:
    model.base.weight = nn.Parameter(value.clone())


def _taken_over_and_loaded(model: Computed, value: Tensor) -> None:
    base = nn.Linear(4, 4, bias=False)
    base.weight = model.base.weight
    model.base = base
    _loaded(model, value)


@pytest.mark.parametrize("give", [_loaded, _part_loaded, _written, _put, _taken_over_and_loaded])
@pytest.mark.parametrize("copied", [False, True])
def test_what_is_computed_follows_what_it_is_computed_from(
    fabric: Fabric, give: Callable[[Computed, Tensor], None], copied: bool
) -> None:
    with fabric.init_module(empty_init=True):
        model = Computed()
    if copied:
        model = copy.deepcopy(model)
    give(model, torch.full((4, 4), 3.0))
    fabric.init_missing(model)
    assert model.rest.norms.tolist() == [6.0] * 4
    assert model(X).isfinite().all()


def test_a_part_is_computed_from_the_own_init_of_what_waits(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = Computed()
    fabric.init_missing(model.rest)
    fabric.init_missing(model)
    assert torch.allclose(model.rest.norms, model.base.weight.norm(dim=1))


def test_a_load_into_a_copy_counts_only_what_it_brings(fabric: Fabric, model: Model) -> None:
    other = copy.deepcopy(model)
    other.load_state_dict({"elsewhere": torch.ones(2)}, strict=False)
    with pytest.raises(UninitializedTensorError, match=r"norm\.weight"):
        other(X)
    other.load_state_dict({"first.bias": torch.ones(4)}, strict=False)
    assert {row.status for row in fabric.init_report(model).rows if row.name == "first.bias"} == {"unfilled"}
    fabric.init_missing(model)
    expected = model.state_dict() | {"first.bias": torch.ones(4)}
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
