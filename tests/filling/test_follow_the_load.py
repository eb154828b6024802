"""What model code computes from a tensor that the checkpoint brings follows the load, in any block."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, deferred_init, materialize
from fabric_init.errors import RecordingError
from tests.support.ranks import run_ranks
from tests.support.zoo import launch, weights

HUNDRED = {"0.weight": torch.full((4, 4), 100.0), "0.bias": torch.zeros(4)}


class Wrapped(nn.Module):
    """A layer with what is computed from its weight: 200 in each row, and what Python decided by it."""

    decides = True

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer, norms = layer, layer.weight.detach().norm(dim=1)
        self.register_buffer("saved", norms)
        self.register_buffer("unsaved", norms.clone(), persistent=False)
        self.attribute = norms.clone()
        self.target = copy.deepcopy(layer)
        self.scale = nn.Parameter(norms * 2)
        if self.decides:
            self.largest = float(layer.weight.detach().abs().max())
            self.large = bool((layer.weight > 50).all())


def second_block(path: Path, strategy: str) -> dict[str, Any]:
    fabric: Fabric = launch(strategy)
    with fabric.init_module(checkpoint=path):
        model = nn.Sequential(nn.Linear(4, 4))
    with fabric.init_module(empty_init=True):
        model[0] = Wrapped(model[0])  # type: ignore[arg-type]
    fabric.init_missing(model)
    model = fabric.setup(model)
    wrapped = model.module[0]
    found: dict[str, Any] = {name: value.tolist() for name, value in weights(model).items()}
    found |= {name: getattr(wrapped, name).tolist() for name in ("unsaved", "attribute")}
    return found | {"largest": wrapped.largest, "large": wrapped.large}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_3"])
def test_a_later_block_computes_from_the_checkpoint_on_every_strategy(tmp_path: Path, strategy: str) -> None:
    torch.save(HUNDRED, tmp_path / "m.pt")
    for found in run_ranks(2, second_block, path=tmp_path / "m.pt", strategy=strategy):
        assert found["largest"] == 100.0
        assert found["large"]
        assert found["attribute"] == found["unsaved"] == found["0.saved"] == [200.0] * 4
        assert found["0.scale"] == [400.0] * 4
        assert found["0.target.weight"] == found["0.layer.weight"] == [[100.0] * 4] * 4
        assert found["0.target.bias"] == [0.0] * 4


def loaded_twice(path: Path | None, other: Path, strategy: str) -> str | list[float]:
    Wrapped.decides = False
    fabric: Fabric = launch(strategy)
    with fabric.init_module(checkpoint=path, empty_init=True):
        model = nn.Sequential(nn.Linear(4, 4))
    if path is None:
        fabric.init_missing(model)
    with fabric.init_module(checkpoint=other, strict=False, rename={r"^0\.": "0.layer."}):
        model[0] = Wrapped(model[0])  # type: ignore[arg-type]
    try:
        fabric.init_missing(model)
        model = fabric.setup(model)
    except RecordingError as error:
        return str(error)
    return weights(model)["0.saved"].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_stage_3"])
def test_what_is_computed_from_a_tensor_that_two_blocks_load_has_the_first_value_or_is_refused(
    tmp_path: Path, strategy: str
) -> None:
    path, other = tmp_path / "m.pt", tmp_path / "other.pt"
    torch.save(HUNDRED, path)
    torch.save({**HUNDRED, "0.weight": torch.full((4, 4), 7.0)}, other)
    for found in run_ranks(2, loaded_twice, path=path, other=other, strategy=strategy):
        assert found == [200.0] * 4 if strategy == "ddp" else "that two blocks give different values" in str(found)
    for found in run_ranks(2, loaded_twice, path=None, other=other, strategy=strategy) if strategy != "ddp" else ():
        assert "that two blocks give different values" in str(found)
    for found in run_ranks(2, loaded_twice, path=path, other=path, strategy=strategy):
        assert found == [200.0] * 4


def test_in_one_block_all_but_decisions_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"0.layer.weight": HUNDRED["0.weight"], "0.layer.bias": HUNDRED["0.bias"]}, tmp_path / "m.pt")
    monkeypatch.setattr(Wrapped, "decides", False)
    with deferred_init():
        model = nn.Sequential(Wrapped(nn.Linear(4, 4)))
    materialize(model, checkpoint=tmp_path / "m.pt", strict=False)
    wrapped: Any = model[0]
    for tensor in (wrapped.saved, wrapped.unsaved, wrapped.attribute):
        assert tensor.tolist() == [200.0] * 4
    assert torch.equal(wrapped.target.weight, HUNDRED["0.weight"])
    assert not hasattr(wrapped, "largest")


@pytest.mark.parametrize("made", ["in the same block", "in a later block"])
def test_what_is_computed_from_a_part_follows_the_load_of_that_part(tmp_path: Path, made: str) -> None:
    torch.save(HUNDRED, tmp_path / "m.pt")
    with deferred_init():
        layers = nn.Sequential(nn.Linear(4, 4))
        targets = copy.deepcopy(layers) if made == "in the same block" else None
    materialize(layers, checkpoint=tmp_path / "m.pt")
    with deferred_init():
        model = nn.ModuleDict({"layers": layers, "targets": targets or copy.deepcopy(layers)})
        model["norms"] = nn.ParameterList([layers[0].weight.detach().norm(dim=1), torch.ones(2)])
    materialize(model)
    found = {name: value.tolist() for name, value in model.state_dict().items()}
    assert found["targets.0.weight"] == found["layers.0.weight"] == [[100.0] * 4] * 4
    assert found["targets.0.bias"] == found["layers.0.bias"] == [0.0] * 4
    assert found["norms.0"] == [200.0] * 4
    assert found["norms.1"] == [1.0] * 2


class Closing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm: Callable[[], Tensor] = functools.partial(torch.clone, self.layer.weight.detach().norm(dim=1))


def test_what_is_kept_outside_of_modules_follows_too(tmp_path: Path) -> None:
    torch.save({"layer.weight": HUNDRED["0.weight"], "layer.bias": HUNDRED["0.bias"]}, tmp_path / "m.pt")
    with deferred_init():
        model = Closing()
    materialize(model, checkpoint=tmp_path / "m.pt")
    assert model.norm().tolist() == [200.0] * 4


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        doubled = self.layer.weight * 2
        self.doubled: Callable[[], Tensor] = lambda: doubled


def test_what_is_kept_with_its_graph_has_the_values_of_the_load_and_not_of_later_steps(tmp_path: Path) -> None:
    torch.save({"layer.weight": HUNDRED["0.weight"], "layer.bias": HUNDRED["0.bias"]}, tmp_path / "m.pt")
    with deferred_init():
        model = Doubling()
    materialize(model, checkpoint=tmp_path / "m.pt")
    with torch.no_grad():
        model.layer.weight.zero_()
    assert model.doubled().tolist() == [[200.0] * 4] * 4


def test_what_the_garbage_collector_does_not_show_has_the_values_of_the_load_too(tmp_path: Path) -> None:
    torch.save({"layer.weight": HUNDRED["0.weight"], "layer.bias": HUNDRED["0.bias"]}, tmp_path / "m.pt")
    with deferred_init():
        model = Doubling()
        tripled = model.layer.weight.detach() * 3
    gc.freeze()
    try:
        materialize(model, checkpoint=tmp_path / "m.pt")
    finally:
        gc.unfreeze()
    with torch.no_grad():
        model.layer.weight.zero_()
    assert model.doubled().tolist() == [[200.0] * 4] * 4
    assert tripled.tolist() == [[300.0] * 4] * 4


class Cut(nn.Module):
    """Has parameters that share memory, and a copy of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.ParameterList(torch.randn(6, 2).chunk(3))
        self.product = self.cut[0].detach() @ self.cut[2].detach()
        self.copied = [copy.deepcopy(self.cut)]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("lacks", [None, "cut.1"])
def test_copies_of_parameters_that_share_memory_follow_their_loads(
    tmp_path: Path, lacks: str | None, cast: bool
) -> None:
    state = {f"cut.{number}": torch.full((2, 2), float(number + 1)) for number in range(3)}
    torch.save({name: value for name, value in state.items() if name != lacks}, tmp_path / "m.pt")
    with deferred_init():
        model = Cut()
        if cast:
            model.cut.double()
    materialize(model, checkpoint=tmp_path / "m.pt", strict=False)
    for number, (one, other) in enumerate(zip(model.cut, model.copied[0], strict=True)):
        assert torch.equal(one, other.to(one.dtype))
        assert (f"cut.{number}" == lacks) != torch.equal(other, state[f"cut.{number}"])
    assert model.product.tolist() == [[6.0] * 2] * 2


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(1, 2).expand(3, 2))
        self.doubled = self.row.detach() * 2


def test_what_is_computed_from_expanded_memory_that_a_load_replaces_is_refused(tmp_path: Path) -> None:
    torch.save({"row": torch.arange(6.0).view(3, 2)}, tmp_path / "m.pt")
    with deferred_init():
        model = Expanded()
    with pytest.raises(RecordingError, match=r"shape \(3, 2\) whose elements share memory"):
        materialize(model, checkpoint=tmp_path / "m.pt")


class Parts(nn.Module):
    """Parameters that are parts of larger tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(6, 8)[:, :3])
        halves = torch.randn(6, 8).chunk(2, 1)
        self.left, self.right = map(nn.Parameter, halves)
        self.repeated = nn.Parameter(torch.randn(1, 4).expand(6, -1))
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.encoder, self.decoder = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.decoder.weight = nn.Parameter(self.encoder.weight.t())


def state_of_parts() -> dict[str, Tensor]:
    torch.manual_seed(4)
    state = {name: torch.randn(tensor.shape) for name, tensor in Parts().state_dict().items()}
    return {**state, "decoder.weight": state["encoder.weight"].t().contiguous()}


def parts(path: Path, strategy: str, strict: bool) -> dict[str, Tensor]:
    fabric: Fabric = launch(strategy)
    with fabric.init_module(checkpoint=path, strict=strict):
        model = Parts()
    return weights(fabric.setup(model))


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])  # FSDP2 refuses parameters that are not contiguous
def test_parts_of_larger_tensors_have_the_files_values(tmp_path: Path, strategy: str, both: bool) -> None:
    state = state_of_parts()
    torch.save({name: tensor for name, tensor in state.items() if both or name != "decoder.weight"}, tmp_path / "m.pt")
    for found in run_ranks(2, parts, path=tmp_path / "m.pt", strategy=strategy, strict=both):
        assert {name for name in state if not torch.equal(found[name], state[name])} == set()
