"""A checkpoint of the model inside meets one with adapters: the error says what to pass, and that works when copied."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.planning.hints.adapters import likely_adapters

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and transformers' own advice

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, Any] = {
    "lora": LoraConfig(**LORA),
    "lora on all linears": LoraConfig(r=2, target_modules="all-linear"),
    "lora on one layer": LoraConfig(**LORA, layers_to_transform=[1]),
    "dora": LoraConfig(**LORA, use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def build(adapter: Any, tied: bool) -> Any:
    torch.manual_seed(3)
    with deferred_init():
        return get_peft_model(llama(tied), adapter)


def inside(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model inside, by the names that they had before."""
    found = {}
    for name, value in model.state_dict().items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        found[plain] = value
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_the_error_proposes_works_when_it_is_copied(tmp_path: Path, name: str, tied: bool) -> None:
    torch.manual_seed(1)
    state = llama(tied).state_dict()
    torch.save(state, tmp_path / "model.pt")
    adapter = ADAPTERS[name]
    with pytest.raises(CheckpointMismatchError) as caught:
        materialize(build(adapter, tied), checkpoint=tmp_path / "model.pt")
    proposed = re.findall(r"Likely: (.*) would load \d+ tensors and initialize the adapters' \d+", str(caught.value))
    assert len(proposed) == 1, str(caught.value)
    assert str(caught.value).count("Likely:") == 1
    model = build(adapter, tied)
    materialize(model, checkpoint=tmp_path / "model.pt", **eval(f"dict({proposed[0]})"))
    found = inside(model)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    torch.manual_seed(3)
    with deferred_init():
        fresh = get_peft_model(llama(tied), adapter)
    materialize(fresh)
    own = {key: value for key, value in fresh.state_dict().items() if "lora_A" in key or "lora_B" in key}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in own.items())


def test_layers_that_peft_copies_begin_as_copies_of_what_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = llama(tied=False).state_dict()
    torch.save(state, tmp_path / "model.pt")
    adapter = LoraConfig(**LORA, modules_to_save=["lm_head"])
    with pytest.raises(CheckpointMismatchError) as caught:
        materialize(build(adapter, tied=False), checkpoint=tmp_path / "model.pt")
    [proposed] = re.findall(r"Likely: (.*) would load \d+ tensors and initialize the adapters' \d+", str(caught.value))
    for strict in (True, False):
        model = build(adapter, tied=False)
        materialize(model, checkpoint=tmp_path / "model.pt", strict=strict, **eval(f"dict({proposed})"))
        head = model.base_model.model.lm_head
        assert torch.equal(head.modules_to_save["default"].weight, state["lm_head.weight"])
        assert torch.equal(head.original_module.weight, state["lm_head.weight"])


def test_unexpected_keys_that_no_rename_helps_are_left_to_strict() -> None:
    missing = {"net.q.base_layer.weight": torch.Size([2, 2]), "net.q.lora_A.weight": torch.Size([1, 2])}
    unexpected = {"q.weight": torch.Size([2, 2])}
    proposed = str(likely_adapters(missing, unexpected, list(missing)))
    assert proposed.startswith(
        r'rename={r"(^|\.)(q)\.(\w+)$": r"\1\2.base_layer.\3", "^": "net."}, reinit=["*.lora_*"]'
    )
    more = unexpected | {"old": torch.Size([3])}
    assert ", strict=False would load 1 tensors" in str(likely_adapters(missing, more, list(missing)))


def test_nothing_is_proposed_where_shapes_or_other_names_say_no() -> None:
    missing = {"q.base_layer.weight": torch.Size([2, 2]), "q.lora_A.weight": torch.Size([1, 2])}
    assert likely_adapters(missing, {"q.weight": torch.Size([3, 2])}, list(missing)) is None
    assert likely_adapters({"q.lora_A.weight": torch.Size([1])}, {"q.weight": torch.Size([1])}, []) is None
    other = missing | {"head.weight": torch.Size([5])}
    assert likely_adapters(other, {"q.weight": torch.Size([2, 2])}, list(other)) is None
