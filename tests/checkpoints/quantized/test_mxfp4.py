"""The experts of gpt-oss: the bits that transformers dequantizes them to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import Dequantize
from tests.checkpoints.quantized.conftest import Open, assert_reads

CONFIG = GptOssConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=3,
    num_experts_per_tok=1,
    pad_token_id=0,
)


def packed(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    return blocks, torch.randint(100, 140, blocks.shape[:3], dtype=torch.uint8)


def test_experts_are_what_transformers_makes_of_them(dequantized: Open) -> None:
    blocks, scales = packed(3, 20, 96)
    reader = dequantized({"a.up_blocks": blocks, "a.up_scales": scales}, {"quant_method": "mxfp4"})
    assert reader.keys() == ("a.up",)
    assert_reads(reader, "a.up", convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_model_refuses_them_and_proposes_the_declaration(strict: bool, tmp_path: Path) -> None:
    state = dict(GptOssForCausalLM(CONFIG).state_dict())
    expected = {}
    for key in [key for key in state if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = state.pop(key).shape
        state[f"{key}_blocks"], state[f"{key}_scales"] = packed(experts, rows, columns)
        expected[key] = convert_moe_packed_tensors(state[f"{key}_blocks"], state[f"{key}_scales"]).float()
    save_file(state, tmp_path / "model.safetensors")
    with deferred_init():
        model = GptOssForCausalLM(CONFIG)
    with pytest.raises(CheckpointMismatchError, match=r"is quantized.*\n.*Likely: convert=\[Dequantize\(\)\]"):
        materialize(model, checkpoint=tmp_path, strict=strict)
    materialize(model, checkpoint=tmp_path, convert=[Dequantize()])
    found = model.state_dict()
    assert expected
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_other_shapes_are_refused(dequantized: Open) -> None:
    blocks, scales = packed(3, 20, 96)
    with pytest.raises(CheckpointMismatchError, match="those are no blocks of 32 numbers"):
        dequantized({"up_blocks": blocks, "up_scales": scales[:, 1:]}, None)
