"""Weights of torchao in safetensors: the bits that its tensors dequantize to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerTensor,
    quantize_,
)

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import Dequantize, open_checkpoint
from fabric_init.planning.recorded_load.converted import converted
from tests.checkpoints.quantized.conftest import assert_reads

CONFIGS: dict[str, Any] = {
    "int8": lambda: Int8WeightOnlyConfig(version=2),
    "int8, activations too": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
    "float8": Float8WeightOnlyConfig,
    "int4 in int8, groups": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    "int8, one scale": lambda: Int8WeightOnlyConfig(granularity=PerTensor(), version=2),
}


def saved(path: Path, make: Any, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 70), nn.Linear(70, 3)).to(dtype)
    quantize_(model, make(), filter_fn=lambda module, name: name == "0")
    state, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_weight_is_what_torchao_dequantizes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weight: Any = saved(path, CONFIGS[name], dtype)[0].weight
    reader = converted(open_checkpoint(path), [Dequantize()])
    assert set(reader.keys()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert_reads(reader, "0.weight", weight.dequantize())


@pytest.mark.parametrize("strict", [True, False])
def test_a_plain_model_refuses_it_and_proposes_the_declaration(strict: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    weight: Any = saved(path, CONFIGS["int8"], torch.float32)[0].weight
    with deferred_init():
        model = nn.Sequential(nn.Linear(64, 70), nn.Linear(70, 3))
    with pytest.raises(CheckpointMismatchError, match=r"Likely: convert=\[Dequantize\(\)\]"):
        materialize(model, checkpoint=path, strict=strict)
    materialize(model, checkpoint=path, convert=[Dequantize()])
    assert torch.equal(model[0].weight, weight.dequantize())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (None, "does not describe 0._weight_qdata: '0.weight'"),
        ("{", "does not describe 0._weight_qdata"),
        ('{"_type": "Int4Tensor", "_data": {}}', "0.weight is torchao's Int4Tensor"),
        ('{"_type": "Int8Tensor", "_data": {"block_size": [1, 7], "dtype": {"_data": "float32"}}}', "blocks of"),
    ],
)
def test_metadata_that_does_not_describe_the_weight_is_refused(said: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {"0._weight_qdata": torch.ones(4, 8, dtype=torch.int8), "0._weight_scale": torch.ones(4, 1)}
    save_file(state, path, {} if said is None else {"0.weight": said})
    with pytest.raises(CheckpointMismatchError, match=message):
        converted(open_checkpoint(path), [Dequantize()])
