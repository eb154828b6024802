"""A recorded model without memory: it refuses what it cannot do, and loses nothing that is loaded into it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import (
    Fabric,
    FabricInitError,
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
    "state_dict": lambda model: model.state_dict(),
    "state_dict of a part": lambda model: model.head.state_dict(),
    "pickle": pickle.dumps,
    "deepcopy": copy.deepcopy,
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


def test_what_an_early_load_was_given_must_not_be_written_before_it_is_read() -> None:
    model, given = build(), state(1)
    model.load_state_dict(given)
    given["head.weight"].zero_()
    with pytest.raises(RecordingError, match=r"head\.weight: what load_state_dict was given"):
        materialize(model)
    model.load_state_dict(state(2))
    materialize(model)
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


def test_a_state_dict_without_values_is_refused() -> None:
    with torch.device("meta"):
        empty = Net().state_dict()
    with pytest.raises(UninitializedTensorError, match=r"body\.0\.weight has no values"):
        build().load_state_dict(empty)


def test_a_full_checkpoint_comes_after_an_early_load(tmp_path: Path) -> None:
    save_file(state(2), tmp_path / "full.safetensors")
    model = build()
    model.load_state_dict(state(1))
    materialize(model, checkpoint=tmp_path / "full.safetensors")
    assert same(model, state(2))


def test_an_early_load_and_a_partial_checkpoint_are_not_mixed(tmp_path: Path) -> None:
    part = {key: value for key, value in state(2).items() if key.startswith("body")}
    save_file(part, tmp_path / "part.safetensors")
    model = build()
    model.load_state_dict(state(1))
    with pytest.raises(FabricInitError, match=r"part\.safetensors .* not strictly"):
        materialize(model, checkpoint=tmp_path / "part.safetensors", strict=False)
    materialize(model)
    assert same(model, state(1))


WRITES: dict[str, Callable[[Net], object]] = {
    "zero_": lambda model: model.head.weight.detach().zero_(),
    "init": lambda model: nn.init.normal_(model.head.weight),
    "copy_": lambda model: model.head.weight.detach().copy_(torch.ones(2, 3)),
    "slice": lambda model: model.head.weight.detach()[0].fill_(1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_after_the_block_would_be_lost_so_it_is_an_error(write: Callable[[Net], object]) -> None:
    model = build()
    write(model)
    with pytest.raises(RecordingError, match=r"head\.weight: written or cast after the recorded block"):
        materialize(model)


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


def test_memory_that_to_empty_gives_has_to_be_written() -> None:
    with deferred_init():
        model = nn.Linear(3, 2)
    model.to_empty(device="cpu")
    with pytest.raises(UninitializedTensorError, match=r"to_empty\(\) has allocated memory"):
        materialize(model)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    materialize(model)
    assert model(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("move", [lambda model: model.to("cpu"), lambda model: model.share_memory()])
def test_a_recorded_model_cannot_be_moved_or_shared(move) -> None:
    with deferred_init():
        model = nn.Linear(3, 2)
    with pytest.raises(UninitializedTensorError, match="Linear cannot be moved or shared: it was recorded"):
        move(model)
    materialize(model)
    move(model)


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


def test_an_activation_function_that_other_models_share_is_not_held_back() -> None:
    shared = nn.GELU()
    with deferred_init():
        nn.Sequential(nn.Linear(2, 2), shared)  # recorded, dropped, never given memory
    assert shared(torch.ones(2)).shape == (2,)
