"""A quantized checkpoint for a plain model, undeclared: always an error, and it names the declaration if that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import Dequantize
from tests.checkpoints.quantized.test_compressed_tensors import NAIVE, PACKED, compressed
from tests.checkpoints.quantized.test_gptq_awq import INPUTS, OUTPUTS, awq, gptq


def stored(scheme: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if scheme == "gptq":
        return gptq(4, "gptq", False)[0], {"quant_method": "gptq", "bits": 4, "group_size": 32}
    if scheme == "awq":
        return awq()[0], {"quant_method": "awq", "bits": 4, "group_size": 32}
    of = PACKED["4 bits"] if scheme == "packed" else NAIVE[scheme]
    format = "pack-quantized" if scheme == "packed" else f"{scheme.split('8')[0]}-quantized"
    state, _, config = compressed(of, format, torch.float32)
    return state, config


SCHEMES = ["gptq", "awq", "packed", "int8, channel", "int8, asymmetric", "float8, channel"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plain_layer_refuses_it(scheme: str, strict: bool, tmp_path: Path) -> None:
    state, config = stored(scheme)
    shape = (OUTPUTS, INPUTS) if scheme in ("gptq", "awq") else (70, 64)
    save_file({f"a.{key}": value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with deferred_init():
        model = nn.ModuleDict({"a": nn.Linear(*reversed(shape), bias=False)})
    with pytest.raises(CheckpointMismatchError, match=r"is quantized.*\n.*Likely: convert=\[Dequantize\(\)\]"):
        materialize(model, checkpoint=tmp_path, strict=strict)
    materialize(model, checkpoint=tmp_path, convert=[Dequantize()])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_of_transformers_refuses_it(scheme: str, strict: bool, tmp_path: Path) -> None:
    state, config = stored(scheme)
    rows, columns = (OUTPUTS, INPUTS) if scheme in ("gptq", "awq") else (70, 64)
    llama = LlamaConfig(
        vocab_size=8,
        hidden_size=columns,
        intermediate_size=rows,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    eager = LlamaForCausalLM(llama).state_dict()
    plain = {key: value for key, value in eager.items() if "up_proj" not in key}
    name = "model.layers.0.mlp.up_proj"
    both = plain | {f"{name}.{key}": value.contiguous() for key, value in state.items()}
    save_file(both, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with deferred_init():
        model = LlamaForCausalLM(llama)
    with pytest.raises(CheckpointMismatchError, match=r"is quantized.*\n.*Likely: convert=\[Dequantize\(\)\]"):
        materialize(model, checkpoint=tmp_path, strict=strict)
    materialize(model, checkpoint=tmp_path, convert=[Dequantize()])


@pytest.mark.parametrize("strict", [True, False])
def test_integers_without_a_scale_are_no_weights(strict: bool, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 3, dtype=torch.int8), "bias": torch.ones(2)}, tmp_path / "m.safetensors")
    with deferred_init():
        model = nn.Linear(3, 2)
    with pytest.raises(CheckpointMismatchError, match="no cast keeps its meaning"):
        materialize(model, checkpoint=tmp_path, strict=strict)


def test_a_scheme_that_nobody_knows_is_no_reason_to_initialize_anew(tmp_path: Path) -> None:
    state = {"a.codes": torch.ones(2, 3, dtype=torch.int8), "a.codebooks": torch.ones(4), "b.weight": torch.ones(1, 1)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "aqlm"}}))
    with deferred_init():
        model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(1, 1)})
    with pytest.raises(CheckpointMismatchError, match=r"is quantized \(aqlm, says its config.json\)"):
        materialize(model, checkpoint=tmp_path, strict=False)
    with pytest.raises(CheckpointMismatchError, match=r"no weight is quantized in a way that is known here; .* aqlm"):
        materialize(model, checkpoint=tmp_path, convert=[Dequantize()])
    materialize(model, checkpoint=tmp_path, strict=False, reinit=["a.weight"])
    assert model["b"].weight.item() == 1
