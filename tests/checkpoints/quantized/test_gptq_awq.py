"""GPTQ and AWQ: what their formats say, packed here number by number as their libraries do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fabric_init import CheckpointMismatchError
from tests.checkpoints.quantized.conftest import Open, assert_reads

INPUTS, OUTPUTS, GROUP = 96, 64, 32


def words_of(numbers: Tensor, bits: int) -> Tensor:
    """Pack along the first dimension: number by number into one stream of bits, cut into words of 32."""
    columns = []
    for column in numbers.T.tolist():
        stream = sum(number << (bits * place) for place, number in enumerate(column))
        count = -(-len(column) * bits // 32)
        parts = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
        columns.append([part - (1 << 32) if part >= 1 << 31 else part for part in parts])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def gptq(
    bits: int, version: str, act_order: bool, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(bits)
    groups = torch.arange(INPUTS) // GROUP
    if act_order:
        groups = groups[torch.randperm(INPUTS)]
    numbers = torch.randint(0, 1 << bits, (INPUTS, OUTPUTS))
    zeros = torch.randint(0, 1 << bits, (INPUTS // GROUP, OUTPUTS))
    scales = torch.rand(INPUTS // GROUP, OUTPUTS).to(dtype) + 0.01
    less = (zeros - 1) & ((1 << bits) - 1) if version == "gptq" else zeros
    state = {
        "qweight": words_of(numbers, bits),
        "qzeros": words_of(less.T, bits).T,
        "scales": scales,
        "g_idx": groups.to(torch.int32),
    }
    # as AutoGPTQ and GPTQModel: an integer times a scale, in the dtype of the scale
    return state, (scales[groups] * (numbers - zeros[groups])).T


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_scale_times_number_less_zero(bits: int, version: str, act_order: bool, dequantized: Open) -> None:
    state, expected = gptq(bits, version, act_order)
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": version}
    reader = dequantized({f"a.{key}": value for key, value in state.items()}, config)
    assert reader.keys() == ("a.weight",)
    assert_reads(reader, "a.weight", expected)


def test_gptq_may_lack_the_groups_of_inputs(dequantized: Open) -> None:
    state, expected = gptq(4, "gptq", False, torch.bfloat16)
    del state["g_idx"]
    assert_reads(dequantized(state, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}), "weight", expected)


def awq() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(6)
    numbers = torch.randint(0, 16, (INPUTS, OUTPUTS))
    zeros = torch.randint(0, 16, (INPUTS // GROUP, OUTPUTS))
    scales = torch.rand(INPUTS // GROUP, OUTPUTS).half() + 0.01

    def packed(values: Tensor) -> Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # WQLinear_GEMM.from_linear
        words = torch.zeros(values.shape[0], OUTPUTS // 8, dtype=torch.int64)
        for word in range(OUTPUTS // 8):
            for place, column in enumerate(order):
                words[:, word] |= values[:, 8 * word + column] << (4 * place)
        return words.to(torch.int32)

    groups = torch.arange(INPUTS) // GROUP
    state = {"qweight": packed(numbers), "qzeros": packed(zeros), "scales": scales}
    return state, ((numbers - zeros[groups]) * scales[groups]).T


def test_awq_is_number_less_zero_times_scale(dequantized: Open) -> None:
    state, expected = awq()
    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    reader = dequantized({f"a.{key}": value for key, value in state.items()}, config)
    assert reader.keys() == ("a.weight",)
    assert_reads(reader, "a.weight", expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "packed as GPTQ and AWQ do it.* there is none"),
        ({"quant_method": "aqlm"}, "that is of 'aqlm'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "the format 'marlin' of 4 bits"),
        ({"quant_method": "gptq", "bits": 5}, "the format 'gptq' of 5 bits"),
        ({"quant_method": "gptq", "bits": 8}, "that does not go together"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "the version 'gemv' of 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "that does not go together"),
    ],
)
def test_what_the_config_does_not_say_or_says_otherwise_is_refused(
    config: dict[str, Any] | None, message: str, dequantized: Open
) -> None:
    state, _ = gptq(4, "gptq", True)
    with pytest.raises(CheckpointMismatchError, match=message):
        dequantized(state, config)


def test_a_group_that_is_not_there_is_refused_when_it_is_read(dequantized: Open) -> None:
    state, _ = gptq(4, "gptq", True)
    state["g_idx"][7] = 9
    reader = dequantized(state, {"quant_method": "gptq", "bits": 4, "group_size": GROUP})
    with pytest.raises(CheckpointMismatchError, match="g_idx names group 9, which is none"):
        reader.read("weight")
