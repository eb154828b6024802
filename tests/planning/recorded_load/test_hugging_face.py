"""Folders of transformers whose layout differs from the modules': in a larger model, and under another head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fabric_init import CheckpointMismatchError, deferred_init, materialize

MOE = Qwen3MoeConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_hidden_layers=2,
    head_dim=8,
)
BERT = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def saved(model: Any, folder: Path) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def same(model: nn.Module, other: nn.Module) -> bool:
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llm = Qwen3MoeForCausalLM(MOE)
        self.head = nn.Linear(16, 3)


def test_experts_are_stacked_as_from_pretrained_stacks_them(tmp_path: Path) -> None:
    expected = saved(Qwen3MoeForCausalLM(MOE), tmp_path)
    with deferred_init():
        model = Qwen3MoeForCausalLM(MOE)
    materialize(model, checkpoint=tmp_path)
    assert same(model, expected)


def test_a_model_inside_another_one_is_converted_too(tmp_path: Path) -> None:
    expected = saved(Qwen3MoeForCausalLM(MOE), tmp_path)
    with deferred_init():
        pair = Pair()
    materialize(pair, checkpoint=tmp_path, rename={"^": "llm."}, reinit=["head.*"])
    assert same(pair.llm, expected)


def test_a_state_dict_in_the_modules_own_names_is_loaded_as_it_is(tmp_path: Path) -> None:
    model = Qwen3MoeForCausalLM(MOE)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    with deferred_init():
        again = Qwen3MoeForCausalLM(MOE)
    materialize(again, checkpoint=tmp_path / "own.pt")
    assert same(again, model)


def test_a_new_head_on_a_base_checkpoint_is_named(tmp_path: Path) -> None:
    base = saved(BertModel(BERT), tmp_path)
    with deferred_init():
        model = BertForSequenceClassification(BERT)
    with pytest.raises(CheckpointMismatchError, match=r"Missing from the checkpoint \(2\):\n  classifier\.weight"):
        materialize(model, checkpoint=tmp_path)
    report = materialize(model, checkpoint=tmp_path, reinit=["classifier.*"])
    assert same(model.bert, base)
    assert {row.name for row in report.rows if row.status == "initialized" and row.kind == "parameter"} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_the_body_of_another_head_is_loaded_and_its_head_is_named(tmp_path: Path) -> None:
    expected = saved(BertForMaskedLM(BERT), tmp_path)
    with deferred_init():
        model = BertModel(BERT, add_pooling_layer=False)
    with pytest.raises(CheckpointMismatchError, match=r"Not in the model \(\d\):\n  cls\.predictions"):
        materialize(model, checkpoint=tmp_path)
    materialize(model, checkpoint=tmp_path, strict=False)
    assert same(model, expected.bert)


def test_a_shape_that_does_not_fit_is_an_error_and_the_model_can_be_tried_again(tmp_path: Path) -> None:
    saved(BertForSequenceClassification(BERT), tmp_path)
    with deferred_init():
        model = BertForSequenceClassification(BertConfig(**{**BERT.to_dict(), "num_labels": 5}))
    with pytest.raises(CheckpointMismatchError, match=r"classifier\.weight is \(5, 16\) in the model and \(2, 16\)"):
        materialize(model, checkpoint=tmp_path)
    materialize(model, checkpoint=tmp_path, reinit=["classifier.*"])
    assert model.classifier.weight.shape == (5, 16)
