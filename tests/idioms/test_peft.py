"""peft around a base model that waits for its values, or that has them; adapters come with the base, or later."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, UninitializedTensorError, deferred_init, materialize
from tests.idioms.setups import launched, make_optimizer
from tests.support.launched import train
from tests.support.ranks import run_ranks
from tests.support.zoo import MODELS, Untied, assert_same, build, tokens, weights, write_checkpoint

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own advice
BASE = "even, untied"


class Files:
    """The base model's weights, and a folder as ``PeftModel.save_pretrained`` writes it."""

    def __init__(self, folder: Path) -> None:
        self.base, self.adapters = folder / "base.pt", folder / "adapters"


def config() -> Any:
    return peft.LoraConfig(r=2, target_modules=["up", "down"])


def write_files(folder: Path) -> Files:
    files = Files(folder)
    write_checkpoint(files.base, BASE)
    model = peft.get_peft_model(Untied(), config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.uniform_(-0.1, 0.1)
    model.save_pretrained(files.adapters)
    return files


def adapters(files: Files) -> dict[str, Tensor]:
    return peft.utils.load_peft_weights(str(files.adapters), device="cpu")


def from_pretrained_then_base(base: nn.Module, files: Files) -> Any:
    model = peft.PeftModel.from_pretrained(base, files.adapters, is_trainable=True)
    with pytest.raises(UninitializedTensorError):
        model(tokens(0))
    prefixed = {
        name.replace(".up.", ".up.base_layer.").replace(".down.", ".down.base_layer."): value
        for name, value in torch.load(files.base).items()
    }
    model.get_base_model().load_state_dict(prefixed, strict=False)
    return model


def base_then_from_pretrained(base: nn.Module, files: Files) -> Any:
    base.load_state_dict(torch.load(files.base))
    return peft.PeftModel.from_pretrained(base, files.adapters, is_trainable=True)


def base_assigned_then_from_pretrained(base: nn.Module, files: Files) -> Any:
    base.load_state_dict(torch.load(files.base), assign=True)
    return peft.PeftModel.from_pretrained(base, files.adapters, is_trainable=True)


def set_state_dict(base: nn.Module, files: Files) -> Any:
    base.load_state_dict(torch.load(files.base))
    model = peft.get_peft_model(base, config())
    peft.set_peft_model_state_dict(model, adapters(files))
    return model


def set_state_dict_with_less_memory(base: nn.Module, files: Files) -> Any:
    base.load_state_dict(torch.load(files.base))
    model = peft.get_peft_model(base, config(), low_cpu_mem_usage=True)
    peft.set_peft_model_state_dict(model, adapters(files), low_cpu_mem_usage=True)
    return model


def whole_assigned(base: nn.Module, files: Files) -> Any:
    model = peft.get_peft_model(base, config())
    state = base_then_from_pretrained(Untied(), files).state_dict()
    model.load_state_dict(state, assign=True)
    return model


WAYS: dict[str, Callable[[nn.Module, Files], Any]] = {
    "from_pretrained, then the base": from_pretrained_then_base,
    "the base, then from_pretrained": base_then_from_pretrained,
    "the base assigned, then from_pretrained": base_assigned_then_from_pretrained,
    "set_peft_model_state_dict": set_state_dict,
    "set_peft_model_state_dict with less memory": set_state_dict_with_less_memory,
    "all assigned": whole_assigned,
}


def trained(fabric: Fabric, model: nn.Module) -> dict[str, Any]:
    model = fabric.setup_module(model)
    loaded = weights(model)
    optimizer = fabric.setup_optimizers(make_optimizer(model))
    return {"loaded": loaded, "losses": train(model, optimizer, fabric), "trained": weights(model)}


def on_this_rank(setups: list[str], files: Files) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for setup in setups:
        fabric = launched(setup)
        for name, way in WAYS.items():
            try:
                with warnings.catch_warnings(action="ignore"):
                    found[setup, name] = trained(fabric, way(build(fabric, BASE, empty_init=True), files))
            except Exception as error:
                error.add_note(f"with {setup}, in the way {name!r}")
                raise
    return found


def check(found: dict[tuple[str, str], dict[str, Any]], files: Files) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    wanted = trained(fabric, base_then_from_pretrained(MODELS[BASE](), files))
    for case, each in found.items():
        try:
            assert_same(each["loaded"], wanted["loaded"])
            assert each["losses"] == wanted["losses"]
            assert_same(each["trained"], wanted["trained"])
        except AssertionError as error:
            error.add_note(f"in {case}")
            raise


def test_adapters_around_a_base_that_waits_on_one_device(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    check(on_this_rank(["one device"], files), files)


def test_adapters_around_a_base_that_waits_on_two_ranks(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    for found in run_ranks(2, on_this_rank, setups=["ddp", "fsdp2"], files=files):
        check(found, files)


def test_adapters_built_on_meta_in_a_second_block_get_their_values_and_those_of_the_base(tmp_path: Path) -> None:
    """``low_cpu_mem_usage=True`` makes parameters like the recorded ones: ``type(p)(data, **p.__dict__)``."""
    files = write_files(tmp_path)
    plain = Untied()
    plain.load_state_dict(torch.load(files.base))
    expected = peft.PeftModel.from_pretrained(plain, files.adapters)
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(checkpoint=files.base):
        base = Untied()
    with fabric.init_module(empty_init=True):
        model = peft.PeftModel.from_pretrained(base, files.adapters, low_cpu_mem_usage=True)
    assert_same(weights(fabric.setup(model)), weights(expected))


def test_a_recorded_parameter_shows_only_what_model_code_has_put_on_it() -> None:
    with deferred_init():
        layer = nn.Linear(2, 2)
        layer.weight.is_special = True  # type: ignore[attr-defined]
        like = type(layer.weight)(layer.weight.detach(), requires_grad=False, **vars(layer.weight))
    assert vars(layer.weight) == vars(like) == {"is_special": True}
    assert isinstance(like, nn.Parameter)
    assert not like.requires_grad
    materialize(layer)
    assert vars(layer.weight) == {"is_special": True}
