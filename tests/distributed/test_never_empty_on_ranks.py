"""``init_module(empty_init=True)`` on several ranks: loading, initializing, and forgetting to do either."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import CheckpointMismatchError, UninitializedTensorError
from fabric_init.guard.before_forward import require
from tests.support.ranks import run_ranks
from tests.support.zoo import (
    STRATEGIES,
    assert_same,
    build,
    launch,
    loss_of,
    one_device,
    set_up,
    tokens,
    weights,
    write_checkpoint,
)

in_every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
# FSDP's models get their own init in setup, so there nothing waits (test_fsdp.py). DeepSpeed's do as well, but refuse
# to run before a load has come.
OWN_INIT_IN_SETUP = [name for name in STRATEGIES if name.startswith("deepspeed")]
GUARDED = [name for name in STRATEGIES if name != "fsdp"]
where_tensors_wait = pytest.mark.parametrize("strategy", GUARDED)
where_each_tensor_waits = pytest.mark.parametrize("strategy", [s for s in GUARDED if s not in OWN_INIT_IN_SETUP])


def load_after_setup(strategy: str, path: Path, how: str, strict: bool) -> tuple[dict[str, Tensor], set[str]]:
    fabric = launch(strategy)
    model = fabric.setup(build(fabric, "transformerish", empty_init=True))
    if how == "load_raw":
        fabric.load_raw(path, model, strict=strict)
    else:
        fabric.load(path, {"model": model}, strict=strict)
    loss = loss_of(model, tokens(0))
    assert loss.isfinite()
    return weights(model), {row.status for row in fabric.init_report(model).rows}


@pytest.mark.parametrize("how", ["load", "load_raw"])
@in_every_strategy
def test_a_full_load_after_setup(strategy: str, how: str, tmp_path: Path) -> None:
    raw = write_checkpoint(tmp_path / "raw.pt", "transformerish")
    expected = weights(one_device("transformerish", checkpoint=raw))
    path = raw
    if how == "load":
        path = tmp_path / "state.pt"
        torch.save({"model": torch.load(raw)}, path)
    for found, statuses in run_ranks(2, load_after_setup, strategy=strategy, path=path, how=how, strict=True):
        assert_same(found, expected)
        assert "unfilled" not in statuses


@where_tensors_wait
def test_a_partial_load_after_setup_leaves_the_rest_to_the_models_own_init(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish", partial=True)
    expected = weights(one_device("transformerish", checkpoint=path, strict=False))
    for found, statuses in run_ranks(2, load_after_setup, strategy=strategy, path=path, how="load_raw", strict=False):
        assert_same(found, expected)
        assert {"loaded", "initialized"} <= statuses


USES: dict[str, Callable[[Any, Any, Path], Any]] = {
    "forward": lambda fabric, model, folder: model(tokens(0)),
    "save": lambda fabric, model, folder: fabric.save(folder / "state", {"model": model}),
}


def forget(strategy: str, use: str, folder: Path) -> tuple[str, float, bool]:
    fabric = launch(strategy)
    model = build(fabric, "transformerish", empty_init=True)
    model, _ = set_up(fabric, model, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    start = time.monotonic()
    with pytest.raises(UninitializedTensorError) as raised:
        USES[use](fabric, model, folder)
    seconds = time.monotonic() - start
    fabric.init_missing(model)
    USES[use](fabric, model, folder)  # nothing is broken by it
    return str(raised.value), seconds, bool(loss_of(model, tokens(0)).isfinite())


@pytest.mark.parametrize("use", USES)
@where_tensors_wait
def test_a_forgotten_load_is_an_error_on_every_rank(strategy: str, use: str, tmp_path: Path) -> None:
    for message, seconds, finite in run_ranks(2, forget, strategy=strategy, use=use, folder=tmp_path):
        for name in ("embed_tokens.weight", "layers.2.down.weight", "norm.bias"):
            assert name in message
        assert "_forward_module" not in message, "names are those of the user's model"
        assert "FSDP" not in message, "so are the names of classes"
        assert "init_missing" in message
        assert seconds < 5
        assert finite


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(self.layer.weight.detach().norm(dim=1))

    def forward(self, batch: Tensor) -> Tensor:
        return self.layer(batch) * self.scale  # type: ignore[no-any-return]


def loaded_by_rank_zero(strategy: str, names: list[str], saves: bool) -> str | dict[str, Tensor]:
    fabric = launch(strategy)
    with fabric.init_module(empty_init=True):
        model = Scaled()
    model = fabric.setup(model)
    state = {"layer.weight": torch.full((4, 4), 100.0), "scale": torch.full((4,), 3.0)}
    with deepspeed_gathers(model):
        if fabric.global_rank == 0:
            model.module.load_state_dict({name: state[name] for name in names}, strict=False)
    if fabric.global_rank == 0 and saves:
        require(model.module, "be saved")
    try:
        model(torch.ones(1, 4))
    except UninitializedTensorError as error:
        return str(error)
    return weights(model)


def deepspeed_gathers(model: nn.Module) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)


def test_what_rank_zero_alone_has_loaded_counts_on_every_rank_of_zero_3() -> None:
    names = ["layer.weight", "scale"]
    for found in run_ranks(2, loaded_by_rank_zero, strategy="deepspeed_stage_3", names=names, saves=True):
        assert isinstance(found, dict)
        assert found["scale"].tolist() == [3.0] * 4


def test_what_rank_zero_alone_has_made_stale_is_an_error_on_every_rank_of_zero_3() -> None:
    for found in run_ranks(2, loaded_by_rank_zero, strategy="deepspeed_stage_3", names=["layer.weight"], saves=False):
        assert "the constructor has computed scale from tensors that have been loaded since setup" in str(found)


def use_one_part(strategy: str) -> list[str]:
    fabric = launch(strategy)
    model = build(fabric, "transformerish", empty_init=True)
    model = fabric.setup(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1" not in name:
                parameter.fill_(0.5)
    with pytest.raises(UninitializedTensorError) as raised:
        model(tokens(0))
    fabric.init_missing(model)
    filled = {name for name, value in weights(model).items() if (value == 0.5).all()}
    return [*sorted(line.strip() for line in str(raised.value).splitlines() if line.startswith("  ")), *sorted(filled)]


@where_each_tensor_waits
def test_what_the_user_wrote_is_neither_missed_nor_overwritten(strategy: str) -> None:
    block = [f"layers.1.{name}" for name in ("down.weight", "norm.bias", "norm.weight", "up.bias", "up.weight")]
    state = weights(one_device("transformerish"))
    parameters = [name for name in state if not name.endswith(("inv_freq", "scale")) and "layers.1" not in name]
    for found in run_ranks(2, use_one_part, strategy=strategy):
        assert found == sorted(block) + sorted(parameters)


def mismatch(strategy: str, path: Path) -> tuple[str, float]:
    fabric = launch(strategy)
    start = time.monotonic()
    with pytest.raises(CheckpointMismatchError) as raised:
        fabric.setup(build(fabric, "transformerish", checkpoint=path))
    return str(raised.value), time.monotonic() - start


@in_every_strategy
def test_a_strict_load_with_missing_keys_fails_alike_on_every_rank(strategy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish", partial=True)
    found = run_ranks(2, mismatch, strategy=strategy, path=path)
    for message, seconds in found:
        assert "layers.1.down.weight" in message
        assert seconds < 10


def run_with_one_left(strategy: str, left: str) -> tuple[str, float]:
    fabric = launch(strategy)
    model = fabric.setup(build(fabric, "uneven", empty_init=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(left):
                parameter.fill_(0.5)
    start = time.monotonic()
    with pytest.raises(UninitializedTensorError) as raised:
        model(tokens(0))
    return str(raised.value), time.monotonic() - start


@pytest.mark.parametrize("left", ["second.bias", "second.weight"])
@where_each_tensor_waits
def test_a_tensor_of_which_some_ranks_have_nothing_is_missed_on_all(strategy: str, left: str) -> None:
    for message, seconds in run_ranks(4, run_with_one_left, strategy=strategy, left=left):
        assert left in message
        assert "first.weight" not in message
        assert seconds < 10


def memory_before_a_load(strategy: str, path: Path) -> tuple[set[str], set[str], dict[str, Tensor]]:
    fabric = launch(strategy)
    model = fabric.setup(build(fabric, "uneven", empty_init=True))
    before = {row.status for row in fabric.init_report(model).rows if row.kind == "parameter"}
    fabric.load_raw(path, model)
    after = {row.status for row in fabric.init_report(model).rows if row.kind == "parameter"}
    return before, after, weights(model)


@pytest.mark.parametrize("world_size", [2, 4])
@where_tensors_wait
def test_what_setup_leaves_a_load_brings(strategy: str, world_size: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "uneven")
    loaded = weights(one_device("uneven", checkpoint=path))
    for before, after, found in run_ranks(world_size, memory_before_a_load, strategy=strategy, path=path):
        assert before == {"initialized" if strategy in OWN_INIT_IN_SETUP else "unfilled"}
        assert after == {"loaded"}
        assert_same(found, loaded)
