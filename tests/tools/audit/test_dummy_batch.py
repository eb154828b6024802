"""Batches generated for models that declare their inputs."""

from __future__ import annotations

import lightning
import pytest
import torch
import transformers as t
from torch import nn

from fabric_init import FabricInitError
from fabric_init.tools.audit.dummy_batch import dummy_batch

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_token_ids_leave_special_tokens_out_but_end_where_there_is_an_end() -> None:
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SMALL))
    ids = dummy_batch(model)["input_ids"]
    assert ids.shape == (4, 32)
    assert ids[:, :-1].min() >= 3
    assert ids.max() < 50
    assert set(ids[:, -1].tolist()) == {2}


def test_the_same_batch_every_time_and_torchs_generator_stays() -> None:
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=50, **SMALL))
    state = torch.get_rng_state()
    first, second = dummy_batch(model), dummy_batch(model)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(torch.get_rng_state(), state)


def test_images_have_the_configs_size_and_the_models_dtype() -> None:
    config = t.ViTConfig(image_size=16, patch_size=8, num_channels=1, **SMALL)
    images = dummy_batch(t.ViTForImageClassification(config).bfloat16())["pixel_values"]
    assert images.shape == (4, 1, 16, 16)
    assert images.dtype is torch.bfloat16


def test_a_decoder_gets_tokens_of_its_own() -> None:
    model = t.T5ForConditionalGeneration(t.T5Config(vocab_size=50, d_model=16, num_layers=1, d_ff=16, num_heads=2))
    assert set(dummy_batch(model)) == {"input_ids", "decoder_input_ids", "use_cache"}


def test_lightnings_example_is_taken() -> None:
    module = lightning.LightningModule()
    module.example_input_array = torch.ones(2, 3)
    assert dummy_batch(module) is module.example_input_array


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()])
def test_a_model_that_says_nothing_is_told_how_to_give_a_batch(model: nn.Module) -> None:
    with pytest.raises(
        FabricInitError, match=r"no batch can be generated .*: audit\(model, batch=\(inputs, labels\)\)"
    ):
        dummy_batch(model)
