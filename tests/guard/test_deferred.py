"""A recorded model without values: it refuses what it cannot do, until materialize gives it some."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fabric_init import (
    Fabric,
    RecordingError,
    UninitializedTensorError,
    deferred_init,
    init_report,
    materialize,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)
        self.register_buffer("angles", torch.linspace(0, 1, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.angles


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    with deferred_init():
        return Net()


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {key: value + 1 for key, value in Net().state_dict().items()}


def same(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


USES: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda model: model(torch.ones(2, 4)),
    "forward of a part": lambda model: model.body[0](torch.ones(2, 4)),
    "values of its state_dict": lambda model: [tensor.tolist() for tensor in model.state_dict().values()],
    "torch.save of a part's state_dict": lambda model: torch.save(model.head.state_dict(), io.BytesIO()),
    "pickle": pickle.dumps,
    "forward of a deepcopy": lambda model: copy.deepcopy(model)(torch.ones(2, 4)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_it_refuses_what_it_has_no_memory_for(use: Callable[[nn.Module], object]) -> None:
    model = build()
    with pytest.raises((UninitializedTensorError, RecordingError), match="materialize"):
        use(model)
    materialize(model)
    use(model)


def test_its_guard_goes_with_materialize() -> None:
    model = build()
    materialize(model)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._state_dict_pre_hooks
        assert not module._load_state_dict_pre_hooks
        assert not [name for name in vars(module) if "fabric_init" in name]


def test_a_state_dict_without_values_is_refused() -> None:
    with torch.device("meta"):
        empty = Net().state_dict()
    with pytest.raises(RuntimeError, match=r'parameter named "body\.0\.weight"'):
        build().load_state_dict(empty)


WRITES: dict[str, Callable[[Net], object]] = {
    "zero_": lambda model: model.head.weight.detach().zero_(),
    "init": lambda model: nn.init.normal_(model.head.weight),
    "copy_": lambda model: model.head.weight.detach().copy_(torch.ones(2, 3)),
    "slice": lambda model: model.head.weight.detach()[0].fill_(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_after_the_block_counts(write: Callable[[Net], object]) -> None:
    torch.manual_seed(0)
    eager = Net()
    model = build()
    for built in (eager, model):
        torch.manual_seed(1)
        write(built)
    report = materialize(model, rng="eager")
    assert torch.equal(model.head.weight, eager.head.weight)
    assert same(model, eager.state_dict())
    assert report.complete


def test_a_part_of_a_recorded_model_can_be_materialized_in_another() -> None:
    parts = build()
    model = nn.Sequential(parts.body, nn.Linear(3, 1))
    model[0].load_state_dict({k.removeprefix("body."): v for k, v in state(1).items() if k.startswith("body")})
    materialize(model)
    assert torch.equal(model[0][0].weight, state(1)["body.0.weight"])
    assert model(torch.ones(2, 4)).shape == (2, 1)


def test_fabric_says_what_to_do_with_a_model_that_was_never_materialized() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = build()
    with pytest.raises(RecordingError, match="materialize"):
        fabric.setup(model)
    materialize(model)
    assert init_report(fabric.setup(model)).complete


def test_memory_that_to_empty_gives_still_waits() -> None:
    with deferred_init():
        model, written = nn.Linear(3, 2), nn.Linear(3, 2)
    for one in (model, written):
        one.to_empty(device="cpu")
        with pytest.raises(UninitializedTensorError, match=r"  weight\n  bias\n"):
            one(torch.ones(1, 3))
    materialize(model)
    assert 0 < model(torch.ones(1, 3)).abs().max() < 4
    nn.init.ones_(written.weight)
    nn.init.zeros_(written.bias)
    materialize(written)
    assert written(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("move", [lambda model: model.to("cpu"), lambda model: model.double()])
def test_a_recorded_model_that_is_moved_or_cast_is_recorded_on(move: Callable[[nn.Module], nn.Module]) -> None:
    with deferred_init():
        model = nn.Linear(3, 2)
    move(model)
    with pytest.raises(UninitializedTensorError, match="  weight\n"):
        model(torch.ones(1, 3, dtype=model.weight.dtype))
    materialize(model)
    assert model(torch.ones(1, 3, dtype=model.weight.dtype)).isfinite().all()


def test_a_recorded_model_has_no_memory_to_share() -> None:
    with deferred_init():
        model = nn.Linear(3, 2)
    with pytest.raises(UninitializedTensorError, match="  weight\n"):
        model.share_memory()
    materialize(model)
    model.share_memory()


def test_an_activation_function_that_other_models_share_is_not_held_back() -> None:
    shared = nn.GELU()
    with deferred_init():
        nn.Sequential(nn.Linear(2, 2), shared)  # recorded, dropped, never given memory
    assert shared(torch.ones(2)).shape == (2,)
