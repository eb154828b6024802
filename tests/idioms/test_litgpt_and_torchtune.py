"""litgpt and torchtune shard each full tensor as the model's ``state_dict`` says, and assign what comes of it."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.load import _lazy_load
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fabric_init import Fabric
from tests.idioms.setups import Files, Found, Idiom, check, tried
from tests.support.ranks import run_ranks


def sharded(model: nn.Module, full: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``full`` as ``model`` is sharded, for the tensors that it has."""
    result: dict[str, Tensor] = {}
    for name, wanted in model.state_dict().items():
        if name not in full:
            continue
        result[name] = full[name].to(wanted.dtype).to(wanted.device)
        if isinstance(wanted, DTensor):
            result[name] = distribute_tensor(result[name], wanted.device_mesh, wanted.placements)
    return result


def torchtune(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """``torchtune.training.load_from_full_model_state_dict``."""
    model.load_state_dict(sharded(model, torch.load(files.raw, mmap=True)), strict=True, assign=True)


def litgpt(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """``litgpt.utils.load_from_full_model_state_dict``, which wraps what it assigns."""
    full = sharded(model, torch.load(files.raw, mmap=True))
    model.load_state_dict({name: nn.Parameter(value) for name, value in full.items()}, strict=False, assign=True)


def offloaded(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """The same, and each shard is sent to the CPU first."""
    full = sharded(model, torch.load(files.raw, mmap=True))
    model.load_state_dict({name: nn.Parameter(value.cpu()) for name, value in full.items()}, assign=True)


def without_adapters(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """The same for LoRA: the checkpoint has no adapters."""
    result = model.load_state_dict(sharded(model, torch.load(files.part)), strict=False, assign=True)
    assert result.missing_keys
    assert not result.unexpected_keys


def adapters_later(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """The same, and ``init_missing``, which finds nothing left to do or does it."""
    without_adapters(fabric, model, files)
    fabric.init_missing(model)


def in_place(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """Sharded tensors are copied into those of the model."""
    model.load_state_dict(sharded(model, torch.load(files.raw)))


def in_place_without_adapters(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """Sharded tensors are copied into those of the model, and what they lack keeps its own init."""
    model.load_state_dict(sharded(model, torch.load(files.part)), strict=False)


def lazily(fabric: Fabric, model: nn.Module, files: Files) -> None:
    """``litgpt.utils.load_checkpoint`` without sharding: tensors of a class of their own, read when they are copied."""
    model.load_state_dict(_lazy_load(files.raw), strict=False)


def lazily_without_adapters(fabric: Fabric, model: nn.Module, files: Files) -> None:
    model.load_state_dict(_lazy_load(files.part), strict=False)


IDIOMS = {
    "torchtune": Idiom(torchtune, keeps_parameters=False),
    "litgpt": Idiom(litgpt, keeps_parameters=False),
    "offloaded": Idiom(offloaded, keeps_parameters=False),
    "without adapters": Idiom(without_adapters, keeps_parameters=False, is_partial=True),
    "adapters later": Idiom(adapters_later, keeps_parameters=False, is_partial=True),
    "in place": Idiom(in_place),
    "in place, without adapters": Idiom(in_place_without_adapters, is_partial=True),
}


WITHOUT_SHARDS = IDIOMS | {
    "lazily": Idiom(lazily),
    "lazily, without adapters": Idiom(lazily_without_adapters, is_partial=True),
}
IN_SETUP = {"ddp": WITHOUT_SHARDS, "fsdp2": IDIOMS, "tensor parallel": IDIOMS}


def on_this_rank(setup: str, files: Files) -> dict[str, Found]:
    return tried(setup, IN_SETUP[setup], files)


@pytest.mark.parametrize("setup", IN_SETUP)
def test_shards_that_follow_the_state_dict_fill_the_model_on_two_ranks(setup: str, untied_files: Files) -> None:
    check(setup, IN_SETUP[setup], untied_files, run_ranks(2, on_this_rank, setup=setup, files=untied_files))


def test_tensors_that_follow_the_state_dict_fill_the_model_on_one_device(untied_files: Files) -> None:
    check("one device", WITHOUT_SHARDS, untied_files, [tried("one device", WITHOUT_SHARDS, untied_files)])
