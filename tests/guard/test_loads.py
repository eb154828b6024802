"""Loads into models without values, before and after they have memory."""

from __future__ import annotations

import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import (
    Fabric,
    UninitializedTensorError,
    deferred_init,
    materialize,
)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.LayerNorm(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.embedding(tokens))


NAMES = ["embedding.weight", "body.0.0.weight", "body.0.0.bias", "body.1.weight", "body.1.bias"]


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


def test_a_state_dict_loaded_before_it_has_memory_is_not_lost() -> None:
    model = build()
    assert str(model.load_state_dict(state(1))) == "<All keys matched successfully>"
    report = materialize(model)
    assert same(model, state(1))
    assert {row.status for row in report.rows if row.kind == "parameter"} == {"loaded"}
    assert torch.equal(model.angles, torch.linspace(0, 1, 2))


def test_what_an_early_load_lacks_gets_the_models_own_init() -> None:
    expected = build()
    materialize(expected)
    own = expected.state_dict()
    model = build()
    part = {key: value for key, value in state(1).items() if key.startswith("body")}
    model.load_state_dict(part, strict=False)
    materialize(model)
    assert same(model, {key: part.get(key, value) for key, value in own.items()})


def test_the_last_of_several_early_loads_wins_tensor_by_tensor() -> None:
    model = build()
    model.load_state_dict(state(1))
    model.head.load_state_dict({"weight": torch.full((2, 3), 7.0)}, strict=False)
    materialize(model)
    assert same(model, {**state(1), "head.weight": torch.full((2, 3), 7.0)})


def test_an_early_load_is_a_copy() -> None:
    model, given = build(), state(1)
    model.load_state_dict(given)
    materialize(model)
    given["head.weight"].zero_()
    assert same(model, state(1))


def test_what_an_early_load_was_given_may_be_written_afterwards() -> None:
    model, given = build(), state(1)
    model.load_state_dict(given)
    given["head.weight"].zero_()
    materialize(model)
    assert same(model, state(1))
    model.load_state_dict(state(2))
    assert same(model, state(2))


def test_an_early_load_with_assign_replaces_an_earlier_one() -> None:
    model = build()
    model.load_state_dict(state(1))
    model.load_state_dict(state(2), assign=True)
    materialize(model)
    assert same(model, state(2))


def test_an_early_load_of_the_wrong_shape_is_torchs_error_and_is_not_kept() -> None:
    model = build()
    with pytest.raises(RuntimeError, match="size mismatch for head"):
        model.load_state_dict({**state(1), "head.bias": torch.ones(5)})
    materialize(model)
    assert model.head.bias.shape == (2,)


def test_a_full_checkpoint_comes_after_an_early_load(tmp_path: Path) -> None:
    save_file(state(2), tmp_path / "full.safetensors")
    model = build()
    model.load_state_dict(state(1))
    materialize(model, checkpoint=tmp_path / "full.safetensors")
    assert same(model, state(2))


def test_what_a_partial_checkpoint_lacks_stays_as_an_early_load_left_it(tmp_path: Path) -> None:
    part = {key: value for key, value in state(2).items() if key.startswith("body")}
    save_file(part, tmp_path / "part.safetensors")
    model = build()
    model.load_state_dict(state(1))
    materialize(model, checkpoint=tmp_path / "part.safetensors", strict=False)
    assert same(model, state(1) | part)


def test_an_early_load_of_a_tie_under_one_of_its_names_is_kept() -> None:
    with deferred_init():
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
    for name in ("0.weight", "1.weight"):
        model.load_state_dict({name: torch.eye(2)}, strict=False)
    model.load_state_dict({name: torch.eye(2) * 2 for name in ("0.weight", "1.weight")})
    materialize(model)
    assert torch.equal(model[0].weight, torch.eye(2) * 2)
    assert model[0].weight is model[1].weight


def test_a_strict_load_that_fails_raises_as_in_plain_pytorch_and_leaves_no_garbage(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"bias\""):
        model.load_state_dict({"weight": torch.ones(2, 2)})
    row = next(row for row in fabric.init_report(model).rows if row.name == "bias")
    assert row.status in ("unfilled", "initialized")
    assert row.status == "unfilled" or model.bias.abs().max() < 1


def test_a_wrapper_of_the_users_own_is_guarded_and_loads_as_well(fabric: Fabric) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with fabric.init_module(empty_init=True):
        inner = nn.Linear(2, 2)
    model = Wrapper(inner)
    with pytest.raises(UninitializedTensorError):
        model(torch.ones(1, 2))
    with pytest.raises(UninitializedTensorError):
        torch.save(model.state_dict(), io.BytesIO())
    model.load_state_dict({"inner.weight": torch.ones(2, 2)}, strict=False)
    assert torch.equal(model.inner.weight, torch.ones(2, 2))
    assert model(torch.ones(1, 2)).isfinite().all()
    assert fabric.init_report(inner).complete


def test_a_cast_and_a_load_of_a_model_into_itself_fill_nothing(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    model.half().load_state_dict(dict(model.named_parameters()), strict=False)
    with pytest.raises(UninitializedTensorError, match=r"  embedding\.weight\n"):
        model(torch.tensor([1]))


def test_models_may_be_built_and_filled_in_several_threads(fabric: Fabric) -> None:
    def build_and_fill(number: int) -> Tensor:
        for _ in range(30):
            with fabric.init_module(empty_init=True):
                model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            model.load_state_dict({name: torch.full_like(value, number) for name, value in state.items()})
        return model(torch.ones(1, 2)).detach()

    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(build_and_fill, range(8))):
            assert torch.equal(found, torch.full((1, 2), float(3 * number) * 2 * number + number))


def test_a_load_that_a_hook_ends_keeps_no_model_alive(fabric: Fabric) -> None:
    def refuse(*args: object) -> None:
        raise LookupError("the user's own")

    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_load_state_dict_pre_hook(refuse)
    with pytest.raises(LookupError):
        model.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
