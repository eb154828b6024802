"""A state dict of a model that waits has names and shapes; its values can be neither read nor saved, by no library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from fabric_init import Fabric, UninitializedTensorError
from tests.idioms.setups import launched, waiting
from tests.support.ranks import run_ranks
from tests.support.zoo import inner, loss_of, tokens

NAME = "layers.0.up.weight"


def part_of(model: Any) -> Any:
    value = model.state_dict()[NAME]
    return value.to_local() if isinstance(value, DTensor) else value


def full_state_dict(fabric: Fabric, model: Any, folder: Path) -> object:
    options = StateDictOptions(full_state_dict=True)
    return get_model_state_dict(inner(model), options=options)[NAME].sum().item()


def full_tensor(fabric: Fabric, model: Any, folder: Path) -> object:
    value = model.state_dict()[NAME]
    return (value.full_tensor() if isinstance(value, DTensor) else value).sum().item()


def saved_as_safetensors(fabric: Fabric, model: Any, folder: Path) -> None:
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    parts = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}
    safetensors.torch.save_file(parts, folder / f"{fabric.global_rank}.safetensors")


def saved_with_dcp(fabric: Fabric, model: Any, folder: Path) -> None:
    try:
        dcp.save(model.state_dict(), checkpoint_id=folder / "dcp")
    except CheckpointException as error:  # torch's own, on all ranks, with what was raised on each
        raise next(iter(error.failures.values()))[0] from error


USES: dict[str, Callable[[Fabric, Any, Path], object]] = {
    "tolist": lambda fabric, model, folder: part_of(model).tolist(),
    "sum": lambda fabric, model, folder: part_of(model).sum().item(),
    "numpy": lambda fabric, model, folder: part_of(model).numpy(),
    "full tensor": full_tensor,
    "full state dict": full_state_dict,
    "torch.save": lambda fabric, model, folder: torch.save(model.state_dict(), folder / f"{fabric.global_rank}.pt"),
    "torch.save of a part": lambda fabric, model, folder: torch.save(part_of(model), folder / "part.pt"),
    "safetensors": saved_as_safetensors,
    "dcp.save": saved_with_dcp,
    "fabric.save": lambda fabric, model, folder: fabric.save(folder / "state", {"model": model}),
    "forward": lambda fabric, model, folder: model(tokens(0)),
}


def refused(setup: str, folder: Path) -> dict[str, str]:
    """What each use raises, and a loss in the end: they have broken nothing."""
    fabric = launched(setup)
    model, _ = waiting(fabric, "even")
    assert {name: value.shape for name, value in model.state_dict().items()}[NAME] == (16, 8)
    found = {}
    for use, run in USES.items():
        try:
            run(fabric, model, folder)
        except BaseException as error:
            found[use] = type(error).__name__ if NAME in str(error) else f"{type(error).__name__}: {error}"
    fabric.init_missing(model)
    assert loss_of(model, tokens(0)).isfinite()
    return found


@pytest.mark.parametrize("setup", ["ddp", "fsdp2", "tensor parallel"])
def test_values_that_wait_are_neither_read_nor_saved_on_two_ranks(setup: str, tmp_path: Path) -> None:
    for found in run_ranks(2, refused, setup=setup, folder=tmp_path):
        assert found == dict.fromkeys(USES, UninitializedTensorError.__name__)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:The argument 'device' of Tensor.is_pinned")
def test_values_that_wait_are_neither_read_nor_saved_on_one_device(tmp_path: Path) -> None:
    assert refused("one device", tmp_path) == dict.fromkeys(USES, UninitializedTensorError.__name__)
