"""Weights that bitsandbytes has quantized: the bits that it gives back itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fabric_init import CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import Dequantize
from tests.checkpoints.quantized.conftest import Open, assert_reads


def four_bits(kind: str, dtype: torch.dtype, nested: bool, rows: int, columns: int, **more: Any) -> nn.Module:
    torch.manual_seed(1)
    layer: nn.Module = bnb.nn.Linear4bit(
        columns, rows, quant_type=kind, compute_dtype=dtype, compress_statistics=nested, **more
    )
    return layer.to(dtype).to("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 128), (300, 96), (5, 50)], ids=str)
def test_four_bits_are_what_dequantize_4bit_gives(
    kind: str, nested: bool, dtype: torch.dtype, shape: tuple[int, int], dequantized: Open
) -> None:
    """Rows of whole blocks, rows that begin within one, and a last block that is not full.

    Blocks are of the flat weight. The library's CPU kernel takes them to begin anew in each row (0.50: values are off
    by up to 2 where a row is not of whole blocks), so it is given a single row, which is what its GPU kernel computes.
    """
    layer = four_bits(kind, dtype, nested, *shape)
    weight: Any = layer.weight
    state = weight.quant_state
    state.shape = torch.Size([state.shape.numel()])
    expected = bnb.functional.dequantize_4bit(weight.data, state).view(shape)
    state.shape = torch.Size(shape)
    reader = dequantized({f"a.{key}": value for key, value in layer.state_dict().items()}, None)
    assert set(reader.keys()) == {"a.weight", "a.bias"}
    assert_reads(reader, "a.weight", expected)


def test_the_bytes_may_be_stored_as_another_dtype(dequantized: Open) -> None:
    layer = four_bits("nf4", torch.bfloat16, True, 48, 128, quant_storage=torch.bfloat16)
    weight: Any = layer.weight
    assert weight.dtype == torch.bfloat16
    reader = dequantized(layer.state_dict(), None)
    assert_reads(reader, "weight", bnb.functional.dequantize_4bit(weight.data, weight.quant_state))


def test_int8_is_what_int8_vectorwise_dequant_gives(dequantized: Open) -> None:
    torch.manual_seed(1)
    weight, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(12, 10).half())
    layout = torch.zeros((), dtype=torch.uint8)
    reader = dequantized({"a.weight": weight, "a.SCB": scales, "a.weight_format": layout}, None)
    assert reader.keys() == ("a.weight",)
    assert_reads(reader, "a.weight", bnb.functional.int8_vectorwise_dequant(weight, scales))


def test_a_layout_for_a_gpu_is_refused(dequantized: Open) -> None:
    state = {"weight": torch.ones(4, 4, dtype=torch.int8), "SCB": torch.ones(4)}
    with pytest.raises(CheckpointMismatchError, match="in a layout for a GPU"):
        dequantized(state | {"weight_format": torch.tensor(2, dtype=torch.uint8)}, None)


@pytest.mark.parametrize("lacks", ["weight.absmax", "weight.quant_map", "weight"])
def test_a_state_without_its_tensors_is_refused(lacks: str, dequantized: Open) -> None:
    state = four_bits("nf4", torch.float32, False, 8, 64).state_dict()
    with pytest.raises(CheckpointMismatchError, match="does not describe the tensors beside it"):
        dequantized({key: value for key, value in state.items() if key != lacks}, None)


@pytest.mark.parametrize("said", [b"{", b'{"shape": [8, 64]}', b"[1]"])
def test_a_state_that_makes_no_sense_is_refused(said: bytes, dequantized: Open) -> None:
    state = four_bits("nf4", torch.float32, False, 8, 64).state_dict()
    state["weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    with pytest.raises(CheckpointMismatchError, match="does not describe the tensors beside it"):
        dequantized(state, None)


# -- whole models ------------------------------------------------------------------------------------------------------

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
WAYS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def quantized_folder(folder: Path, way: str) -> dict[str, Tensor]:
    """A folder that transformers has saved, and the weights that it dequantizes to."""
    torch.manual_seed(2)
    LlamaForCausalLM(CONFIG).to(torch.bfloat16).save_pretrained(folder / "plain")
    model: Any = LlamaForCausalLM.from_pretrained(
        folder / "plain", quantization_config=WAYS[way], dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder / way)
    return {key: value.detach() for key, value in model.dequantize(dtype=torch.bfloat16).state_dict().items()}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_transformers_has_saved_is_dequantized_or_refused(way: str, tmp_path: Path) -> None:
    expected = quantized_folder(tmp_path, way)
    with deferred_init():
        model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    for strict in (True, False):
        with pytest.raises(CheckpointMismatchError, match=r"Likely: convert=\[Dequantize\(\)\]"):
            materialize(model, checkpoint=tmp_path / way, strict=strict)
    materialize(model, checkpoint=tmp_path / way, convert=[Dequantize()])
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
